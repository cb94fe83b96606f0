"""The owner of all state, as one object without sockets: messages in, decisions, messages out.

`process.py` hands it every message and sends what the outboxes hold. Nothing here waits, reads a file or knows text.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Iterable

from manylora.lora.page_layout import PoolGeometry
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import (
    BadRequestError,
    BusyError,
    ContextLengthError,
    ErrorInfo,
    ManyloraError,
    ProtocolError,
    QueueFullError,
)
from manylora.runtime.messages import (
    Abort,
    AdapterCopied,
    AdapterImage,
    AdapterStaged,
    Done,
    FlushCache,
    FrontToScheduler,
    GenerateReq,
    GetState,
    LoadAdapter,
    LoadFailed,
    Rejected,
    StepOutput,
    Submit,
    UnloadAdapter,
    pack_i64,
    unpack_i64,
)
from manylora.runtime.model_config import ModelConfig
from manylora.runtime.plan import ForwardOutput
from manylora.runtime.sampling_params import MAX_STOP_TOKEN_IDS
from manylora.scheduler.adapter_limits import FitChecker
from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.admission import Admission
from manylora.scheduler.host_tier import HostTier, Outbox
from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.ledger import Ledger
from manylora.scheduler.memory import Memory, PoolLimits
from manylora.scheduler.outputs import OutputReader, finish_error
from manylora.scheduler.planner import Planner
from manylora.scheduler.progress import Progress
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import Group, Sequence
from manylora.scheduler.sequence_memory import SequenceMemory
from manylora.scheduler.step import StepRecord
from manylora.scheduler.version import Version

__all__ = ["PoolLimits", "Scheduler"]

OVERLAP_DEPTH = 2  # steps in flight


class Scheduler:
    """Decides for one engine. `limits` are the smallest of all ranks; `seed` draws the seeds of requests without one.

    `to_front`, `to_workers`, `to_loader` and `released_images` (files to unlink) are emptied by the caller after each
    call. Every rank gets `to_workers` in order; messages to the front may be sent at once.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelConfig,
        geometry: PoolGeometry,
        limits: PoolLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        seed: int,
    ) -> None:
        outbox = Outbox()
        self.to_front = outbox.to_front
        self.to_workers = outbox.to_workers
        self.to_loader = outbox.to_loader
        self.released_images = outbox.released_images
        schedule, lora, tp_size = config.schedule, config.lora, config.parallel.tp_size
        chunk_size = schedule.chunked_prefill_size
        self._model = model
        self._context_length = config.model.context_length or model.max_position_embeddings
        self._max_queued = schedule.max_queued_requests
        self._shares_prefixes = not config.cache.disable_radix_cache
        self._depth = 1 if schedule.disable_overlap_schedule else OVERLAP_DEPTH
        self._random = random.Random(seed)
        self._num_arrived = 0
        self._in_flight: deque[StepRecord] = deque()
        self._steps = StepClock()
        self._progress = Progress(clock)
        self._memory = Memory(
            limits,
            page_size=geometry.page_size,
            max_total_tokens=config.cache.max_total_tokens,
            clock=self._steps,
        )
        self._fit = FitChecker(
            limits,
            page_size=geometry.page_size,
            max_kv_pages=self._memory.max_kv_pages,
            max_loaded_loras=lora.max_loaded_loras,
        )
        self._host = HostTier(limits.num_host_pages, lora.max_loaded_loras, tp_size, outbox)
        self._adapters = AdapterTable(
            lora,
            self._memory,
            self._host,
            self._fit,
            tp_size=tp_size,
            clock=self._steps,
            outbox=outbox,
            live_sequences=self._live_sequences,
            on_unavailable=self._fail_waiting,
        )
        sequences = SequenceMemory(self._memory)
        # A step holds a row of each running sequence, so no more may run than a step has tokens.
        num_slots = min(schedule.max_running_requests, chunk_size)
        self._roster = Roster(num_slots, sequences, self._adapters)
        admission = Admission(
            self._roster,
            self._adapters,
            sequences,
            max_adapters=lora.max_loras_per_batch,
            chunk_size=chunk_size,
        )
        self._planner = Planner(
            self._roster, admission, sequences, token_budget=chunk_size, vocab_size=model.vocab_size
        )
        self._outputs = OutputReader(self._roster, sequences, geometry.page_size)
        self._ledger = Ledger(self._roster, self._adapters, self._memory, self._host, self._steps)

    # ---- messages in --------------------------------------------------------------------------------------------

    def on_front(self, message: FrontToScheduler) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                for handle in unpack_i64(message.handles):
                    if sequence := self._roster.live.get(handle):
                        self._roster.end(sequence)
            case LoadAdapter():
                self._adapters.on_load(message)
            case UnloadAdapter():
                self._adapters.on_unload(message)
                self._roster.changed = True
            case FlushCache():
                self._flush(message)
            case GetState():
                self.to_front.append(self._ledger.state(message.call))

    def on_loader(self, message: AdapterImage | LoadFailed) -> None:
        if isinstance(message, AdapterImage):
            self._adapters.on_image(message)
        else:
            self._adapters.on_load_failed(message)
        self._roster.changed = True

    def on_worker(self, message: ForwardOutput | AdapterStaged | AdapterCopied) -> None:
        """An answer: of a step from rank 0, of an adapter command from each rank."""
        if isinstance(message, ForwardOutput):
            self._complete_step(message)
            return
        if isinstance(message, AdapterStaged):
            self._adapters.on_staged(message)
        else:
            self._adapters.on_copied(message)
        self._roster.changed = True

    def loader_lost(self) -> None:
        """The loader died: fail what waits for it. A new one starts with an empty list of jobs."""
        self._adapters.on_loader_lost()

    # ---- decisions ----------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Plan steps until as many are in flight as may be, or nothing can be planned."""
        while len(self._in_flight) < self._depth:
            planned = self._planner.plan(self._steps.planned + 1)
            if planned is None:
                return
            plan, record = planned
            self._steps.planned = plan.step
            self._in_flight.append(record)
            self.to_workers.append(plan)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is under way."""
        return not (self._roster.live or self._in_flight or self._adapters.busy)

    def check(self) -> None:
        """Recount everything from scratch; AssertionError if the books are wrong."""
        self._ledger.check()

    def _complete_step(self, output: ForwardOutput) -> None:
        if not self._in_flight or self._in_flight[0].step != output.step:
            raise ProtocolError(f"a worker answered step {output.step}, which is not the oldest in flight")
        record = self._in_flight.popleft()
        self._steps.completed = output.step
        answer = self._outputs.read(record, output)
        if answer is not None:
            self.to_front.append(answer)
        self._progress.add(len(record.samples), self._roster, self._memory)

    def _submit(self, call: Submit) -> None:
        try:
            accepted = self._check_call(call)
        except ManyloraError as error:
            handles = pack_i64(request.handle for request in call.requests)
            self.to_front.append(Rejected(handles, error.info()))
            return
        for sequence, version in accepted:
            self._roster.add(sequence, version)

    def _check_call(self, call: Submit) -> list[tuple[Sequence, Version | None]]:
        """Every sequence of a call, or the error that refuses all of it."""
        count = sum(request.params.n for request in call.requests)
        if len(self._roster.waiting) + count > self._max_queued:
            raise QueueFullError(
                f"{len(self._roster.waiting)} sequences wait already; {count} more exceed the limit of "
                f"{self._max_queued} (--max-queued-requests)."
            )
        self._adapters.check_requested({r.lora_name for r in call.requests if r.lora_name is not None})
        accepted: list[tuple[Sequence, Version | None]] = []
        for request in call.requests:
            version = self._adapters.names[request.lora_name] if request.lora_name is not None else None
            accepted += [(sequence, version) for sequence in self._make_samples(request, version)]
        return accepted

    def _make_samples(self, request: GenerateReq, version: Version | None) -> list[Sequence]:
        params = request.params
        seed = params.seed if params.seed is not None else params.sampling_seed
        if seed is None:
            seed = self._random.getrandbits(63)
        samples: list[Sequence] = []
        for index in range(params.n):
            self._num_arrived += 1
            samples.append(
                Sequence(
                    request,
                    index,
                    arrival=self._num_arrived,
                    seed=seed,
                    eos_ids=self._model.eos_token_ids,
                )
            )
        first = samples[0]
        self._check_request(first, version)
        namespace = version.id if version else 0
        if not self._shares_prefixes:
            namespace = -first.arrival if len(samples) > 1 else None
        group = Group(samples, None if self._shares_prefixes else namespace) if len(samples) > 1 else None
        for sequence in samples:
            sequence.namespace, sequence.group = namespace, group
        return samples

    def _check_request(self, sequence: Sequence, version: Version | None) -> None:
        if not sequence.tokens:
            raise BadRequestError("input_ids cannot be empty.", param="input_ids")
        if sequence.max_len > self._context_length:
            raise ContextLengthError(
                f"The request has {sequence.prompt_len} prompt tokens and asks for "
                f"{sequence.max_len - sequence.prompt_len} new ones; the context holds {self._context_length}."
            )
        if len(sequence.stop_ids) > MAX_STOP_TOKEN_IDS:
            raise BadRequestError(
                f"stop_token_ids and the model's end tokens are {len(sequence.stop_ids)}; "
                f"at most {MAX_STOP_TOKEN_IDS} are possible.",
                param="sampling_params.stop_token_ids",
            )
        self._fit.check_sequence(sequence, version, self._adapters.versions.values())

    def _flush(self, call: FlushCache) -> None:
        error = None
        if self._roster.live:
            error = BusyError("The cache cannot be flushed while requests run or wait.").info()
        else:
            self._memory.tree.clear()
        self.to_front.append(Done(call.call, error))

    def _live_sequences(self) -> Iterable[Sequence]:
        return self._roster.live.values()

    def _fail_waiting(self, version: Version, error: ErrorInfo) -> None:
        """A version cannot be made ready: end the sequences that wait for it."""
        failed = self._roster.waiting.of(version.id)
        for sequence in failed:
            self._roster.end(sequence)
        if failed:
            finishes = [finish_error(sequence.handle, error) for sequence in failed]
            self.to_front.append(StepOutput(b"", b"", finishes=finishes))
