"""The front's half of every request: text to ids, ids to text, one coroutine per call.

`TokenizerManager` owns the front's end of the pipe to the scheduler and one state per sequence, found by handle. It
applies each step's one message, ends sequences at stop strings, and tells the scheduler when nobody waits any more.
It decides nothing about adapters, memory or order: those are the scheduler's.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Iterable

from manylora.runtime.errors import (
    BadRequestError,
    ManyloraError,
    NotReadyError,
    ShuttingDownError,
    error_from,
)
from manylora.runtime.ipc import Pipe
from manylora.runtime.log import REQUEST_ID
from manylora.runtime.messages import (
    Abort,
    FrontToScheduler,
    GenerateReq,
    Rejected,
    SchedulerToFront,
    ServerInfo,
    StepOutput,
    Submit,
    pack_i32,
    pack_i64,
    unpack_i32,
    unpack_i64,
)
from manylora.tokenizer_manager.administration import Administration
from manylora.tokenizer_manager.answer import Answer
from manylora.tokenizer_manager.generate_call import (
    GenerateCall,
    check_encoded,
    check_prompt,
    fit_params,
)
from manylora.tokenizer_manager.request_metrics import RequestMetrics
from manylora.tokenizer_manager.running_call import RunningCall
from manylora.tokenizer_manager.scheduler_client import SchedulerClient
from manylora.tokenizer_manager.sequence import Sequence
from manylora.tokenizer_manager.tokenizer import Tokenizer

logger = logging.getLogger("manylora.front")

INLINE_CHARACTERS = 4096  # texts beyond this are tokenized in a thread, beside the event loop


class TokenizerManager(Administration):
    """Lives in one event loop; every method is called there. `metrics`: what it counts of requests."""

    def __init__(self, pipe: Pipe[FrontToScheduler, SchedulerToFront]) -> None:
        """`pipe`: the front's end. Must be called in the event loop that will serve."""
        self.metrics = RequestMetrics()
        self._scheduler = SchedulerClient(pipe, self._on_output, self._fail_calls)
        self._tokenizer: Tokenizer | None = None
        self._handles = itertools.count(1)
        self._running: dict[int, tuple[Sequence, RunningCall]] = {}  # by handle
        self._rids: set[str] = set()  # of all calls that wait

    # ---- start and end --------------------------------------------------------------------------------------------

    async def start(self) -> ServerInfo:
        """Wait for the scheduler's first message, then load the tokenizer. Raises what made the start fail."""
        info = await self._scheduler.wait_info()
        self._tokenizer = await asyncio.to_thread(Tokenizer, info.tokenizer_dir or info.model_dir)
        return info

    @property
    def info(self) -> ServerInfo:
        """What the scheduler said first. Raises NotReadyError before that."""
        return self._scheduler.info

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises NotReadyError before `start` is through."""
        if self._tokenizer is None:
            raise NotReadyError("The server is still starting.")
        return self._tokenizer

    @property
    def failure(self) -> ManyloraError | None:
        """Why nothing can be answered any more."""
        return self._scheduler.failure

    async def wait_failed(self) -> ManyloraError:
        """Sleep until there is a failure; which."""
        await self._scheduler.failed.wait()
        assert self._scheduler.failure is not None
        return self._scheduler.failure

    def fail(self, error: ManyloraError) -> None:
        """End everything that waits, and every later call, with `error`. The first one stays."""
        self._scheduler.fail(error)

    def close(self) -> None:
        """Read the pipe no more. For the end of the event loop; whoever still waits is failed first."""
        self._scheduler.fail(ShuttingDownError("The server is shutting down."))

    # ---- text ---------------------------------------------------------------------------------------------------

    async def generate(self, call: GenerateCall) -> list[Answer]:
        """The finished answers, one per sequence in order. Cancelled: everything of the call is aborted.

        Raises BadRequestError, QueueFullError or whatever ended a sequence.
        """
        running = await self._submit(call, stream=False)
        try:
            return await running.answers()
        finally:
            self._release(running)

    async def stream(self, call: GenerateCall) -> AsyncGenerator[list[Answer], None]:
        """Lists of answers that changed, each with all of its text so far, until all have ended.

        Raises as `generate`. Close it (`contextlib.aclosing`) to abort what still runs.
        """
        running = await self._submit(call, stream=True)
        try:
            while answers := await running.changes():
                yield answers
        finally:
            self._release(running)

    def abort(self, rid_prefix: str, *, abort_all: bool = False) -> None:
        """End the sequences whose request id begins with `rid_prefix`, or all; they answer what they have."""
        chosen = [
            (sequence, call)
            for sequence, call in self._running.values()
            if abort_all or sequence.rid.startswith(rid_prefix)
        ]
        for sequence, call in chosen:
            sequence.abort("Aborted by /abort_request.")
            self.metrics.end(sequence)
            del self._running[sequence.handle]
            call.note(sequence)
        self._abort(sequence.handle for sequence, _ in chosen)

    # ---- a call's way in and out ------------------------------------------------------------------------------------

    async def _submit(self, call: GenerateCall, *, stream: bool) -> RunningCall:
        started_at = time.monotonic()
        REQUEST_ID.set(call.name)
        self._scheduler.check_alive()
        for prompt in call.prompts:
            check_prompt(prompt, self.info)
        prompt_ids = await self._encode(call)
        self._scheduler.check_alive()
        requests: list[GenerateReq] = []
        sequences: list[Sequence] = []
        for prompt, ids in zip(call.prompts, prompt_ids, strict=True):
            params = fit_params(prompt, len(ids), self.info)
            handles = [next(self._handles) for _ in range(params.n)]
            requests.append(
                GenerateReq(
                    handles[0],
                    pack_i32(ids),
                    params,
                    prompt.lora_name,
                    num_top=prompt.top_logprobs_num if prompt.return_logprob else -1,
                    logprob_start_len=prompt.logprob_start_len if prompt.return_logprob else -1,
                )
            )
            for sample, handle in enumerate(handles):
                sequences.append(
                    Sequence(
                        handle,
                        prompt.rid if params.n == 1 else f"{prompt.rid}_{sample}",
                        prompt,
                        params,
                        ids,
                        self.tokenizer,
                        started_at=started_at,
                        stream=stream,
                        index=len(sequences) if stream and call.answers_list else None,
                    )
                )
        running = RunningCall(sequences, stream=stream)
        self._take_rids(sequences)
        self._running.update((sequence.handle, (sequence, running)) for sequence in sequences)
        try:
            self._scheduler.send(Submit(requests))
        except UnicodeEncodeError as error:  # a lone surrogate, which JSON cannot hold and Python can
            self._forget(running)  # it was never accepted, so nothing of it ended
            self._release(running)
            raise BadRequestError("a name, a stop string or a grammar is not valid Unicode") from error
        return running

    async def _encode(self, call: GenerateCall) -> list[list[int]]:
        texts = [prompt.text for prompt in call.prompts if prompt.text is not None]
        special = call.add_special_tokens
        if sum(map(len, texts)) > INLINE_CHARACTERS:
            id_lists = await asyncio.to_thread(
                self.tokenizer.encode_long, texts, self.info.context_length, add_special_tokens=special
            )
        else:
            id_lists = self.tokenizer.encode(texts, add_special_tokens=special)
        for ids in id_lists:
            check_encoded(ids, self.info.model.vocab_size)
        encoded = iter(id_lists)
        return [next(encoded) if prompt.input_ids is None else prompt.input_ids for prompt in call.prompts]

    def _take_rids(self, sequences: list[Sequence]) -> None:
        rids = [sequence.rid for sequence in sequences]
        taken = set(rids)
        if len(taken) < len(rids) or not taken.isdisjoint(self._rids):
            seen = set(self._rids)
            repeated = next(rid for rid in rids if rid in seen or seen.add(rid))
            raise BadRequestError(f"Duplicate request ID detected: {repeated}", param="rid")
        self._rids |= taken

    def _release(self, call: RunningCall) -> None:
        """The caller is gone or has its answer: forget the call and stop what still runs for it."""
        self._rids.difference_update(sequence.rid for sequence in call.sequences)
        left = self._forget(call)
        self.metrics.leave(len(left))
        self._abort(left)

    def _forget(self, call: RunningCall) -> list[int]:
        """Listen to none of the call's sequences any more; the handles of those that had not ended."""
        return [s.handle for s in call.sequences if self._running.pop(s.handle, None) is not None]

    def _abort(self, handles: Iterable[int]) -> None:
        if (packed := pack_i64(handles)) and self.failure is None:
            self._scheduler.send(Abort(packed))

    # ---- what the scheduler says ------------------------------------------------------------------------------------

    def _fail_calls(self, error: ManyloraError) -> None:
        for _, call in self._running.values():
            call.fail(error)

    def _on_output(self, message: StepOutput | Rejected) -> None:
        if isinstance(message, StepOutput):
            self._apply_step(message)
            return
        for handle in unpack_i64(message.handles):
            if entry := self._running.get(handle):
                self.metrics.reject(message.error.code, len(self._forget(entry[1])))
                entry[1].fail(error_from(message.error))

    def _apply_step(self, output: StepOutput) -> None:
        running = self._running
        touched: dict[int, tuple[Sequence, RunningCall]] = {}
        for start in output.starts:
            if entry := running.get(start.handle):
                entry[0].start(start)
                self.metrics.start(entry[0], start)
        tokens = unpack_i32(output.tokens)
        for handle, token in zip(unpack_i64(output.handles), tokens, strict=True):
            if entry := running.get(handle):
                entry[0].output_ids.append(token)
                touched[handle] = entry
        self.metrics.add_tokens(len(tokens), [sequence for sequence, _ in touched.values()])
        for chunk in output.logprobs:
            if entry := running.get(chunk.handle):
                entry[0].add_logprobs(chunk)
        for finish in output.finishes:
            if entry := running.get(finish.handle):
                entry[0].end(finish)
                touched[finish.handle] = entry
        self._abort([handle for handle, entry in touched.items() if self._advance(*entry)])

    def _advance(self, sequence: Sequence, call: RunningCall) -> bool:
        """Bring a sequence's text up to date. True if it ended here, and the scheduler does not know yet."""
        ended_there = sequence.ended
        stopped_here = (sequence.eager or ended_there) and sequence.advance()
        if sequence.ended:
            self.metrics.end(sequence)
            del self._running[sequence.handle]
        call.note(sequence)
        return stopped_here and not ended_there
