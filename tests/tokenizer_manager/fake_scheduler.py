"""The scheduler's end of a real pipe, acted by a few lines: a fixed answer per prompt, one token a step.

It keeps the contract of `runtime/messages.py` (whole or refused, one StepOutput a step, Start with the first token,
eos and limits) and records what it was sent. It knows nothing of memory or of adapters beyond their names.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zmq

from manylora.runtime.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BusyError,
    ErrorInfo,
    ManyloraError,
)
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import (
    Abort,
    AdapterReply,
    AdapterState,
    Done,
    Finish,
    FlushCache,
    FrontToScheduler,
    GenerateReq,
    GetState,
    LoadAdapter,
    LogprobChunk,
    Rejected,
    SchedulerToFront,
    ServerInfo,
    Start,
    State,
    StepOutput,
    Submit,
    UnloadAdapter,
    UpdateAdapter,
    pack_i32,
    pack_i64,
    unpack_i32,
    unpack_i64,
)
from manylora.runtime.model_config import ModelConfig, parse_model_config
from tests.tokenizer_manager.tiny_tokenizer import BOS_ID, EOS_ID

CONTEXT_LENGTH = 256
VOCAB_SIZE = 300
CACHED_TOKENS = 3


@dataclass
class FakeSequence:
    """One sample in the making. `script`: the tokens the model would say, whatever the limits."""

    request: GenerateReq
    handle: int
    script: list[int]
    version: int
    sent: int = 0


def echo(prompt: list[int]) -> list[int]:
    """A model that repeats its prompt (without BOS, if there is more), again and again."""
    return (prompt[1:] or prompt) * CONTEXT_LENGTH


class FakeScheduler:
    """answer: prompt ids -> the tokens to generate. held: no step is made while true. received: all messages."""

    def __init__(self, pipe: Pipe[SchedulerToFront, FrontToScheduler]) -> None:
        self.pipe = pipe
        self.answer: Callable[[list[int]], list[int]] = echo
        self.held = False
        self.tokens_per_step = 1
        self.refusal: ManyloraError | None = None
        self.load_refusal: ManyloraError | None = None
        self.failing_token: tuple[int, ManyloraError] | None = None  # (after so many tokens, with this error)
        self.received: list[FrontToScheduler] = []
        self.adapters: dict[str, tuple[str, int]] = {}
        self.running: dict[int, FakeSequence] = {}
        self.steps = 0
        self._last_version = 0

    @property
    def aborted(self) -> list[int]:
        return [handle for m in self.received if isinstance(m, Abort) for handle in unpack_i64(m.handles)]

    async def announce(self, tokenizer_dir: Path) -> None:
        """Say ServerInfo, once the front is connected: the end that binds cannot send before."""
        await until(lambda: self.pipe.socket.poll(0, zmq.POLLOUT))
        self.pipe.send(server_info(tokenizer_dir))

    async def run(self) -> None:
        while True:
            for message in self.pipe.drain():
                self.received.append(message)
                self._handle(message)
            if self.running and not self.held:
                self.step()
            await asyncio.sleep(0.001)

    def _handle(self, message: FrontToScheduler) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                for handle in unpack_i64(message.handles):
                    self.running.pop(handle, None)
            case LoadAdapter():
                self._load(message)
            case UnloadAdapter():
                error, state = self._find(message.lora_name)
                self.adapters.pop(message.lora_name, None)
                self.pipe.send(AdapterReply(message.call, self._paths(), error, adapter=state))
            case UpdateAdapter():
                error, state = self._find(message.lora_name)
                self.pipe.send(AdapterReply(message.call, self._paths(), error, adapter=state))
            case FlushCache():
                error = BusyError("requests are running").info() if self.running else None
                self.pipe.send(Done(message.call, error))
            case GetState():
                self.pipe.send(self._state(message.call))

    def _submit(self, message: Submit) -> None:
        unknown = [r.lora_name for r in message.requests if r.lora_name and r.lora_name not in self.adapters]
        refusal = AdapterNotFoundError(f"not loaded: {unknown[0]}") if unknown else self.refusal
        if refusal is not None:
            handles = pack_i64(request.handle for request in message.requests)
            self.pipe.send(Rejected(handles, refusal.info()))
            return
        for request in message.requests:
            script = self.answer(list(unpack_i32(request.input_ids)))
            version = self.adapters[request.lora_name][1] if request.lora_name else 0
            for handle in range(request.handle, request.handle + request.params.n):
                self.running[handle] = FakeSequence(request, handle, script, version)

    def _load(self, message: LoadAdapter) -> None:
        error, replaced = self.load_refusal, 0
        if message.lora_name in self.adapters and not message.replace:
            error = AdapterExistsError(f"{message.lora_name} is already loaded", param="lora_name")
        if error is not None:
            self.pipe.send(AdapterReply(message.call, self._paths(), error.info()))
            return
        self._last_version += 1
        if old := self.adapters.pop(message.lora_name, None):
            replaced = old[1]
        self.adapters[message.lora_name] = (message.lora_path, self._last_version)
        _, state = self._find(message.lora_name)
        self.pipe.send(AdapterReply(message.call, self._paths(), None, self._last_version, replaced, state))

    def _find(self, name: str) -> tuple[ErrorInfo | None, AdapterState | None]:
        states = [state for state in self._states() if state.lora_name == name]
        if states:
            return None, states[0]
        return AdapterNotFoundError(f"no {name}", param="lora_name").info(), None

    def _paths(self) -> dict[str, str]:
        return {name: path for name, (path, _) in self.adapters.items()}

    def step(self) -> None:
        """One step: the next token of every running sequence, in one message."""
        self.steps += 1
        handles: list[int] = []
        tokens: list[int] = []
        starts: list[Start] = []
        finishes: list[Finish] = []
        logprobs: list[LogprobChunk] = []
        for sequence in list(self.running.values()):
            if sequence.sent == 0:
                starts.append(Start(sequence.handle, CACHED_TOKENS, sequence.version))
                logprobs += _prompt_logprobs(sequence)
            for _ in range(self.tokens_per_step):
                if sequence.handle in self.running:
                    finish = self._advance(sequence, handles, tokens, logprobs)
                    if finish is not None:
                        finishes.append(finish)
                        del self.running[sequence.handle]
        self.pipe.send(StepOutput(pack_i64(handles), pack_i32(tokens), starts, finishes, logprobs))

    def _advance(
        self, sequence: FakeSequence, handles: list[int], tokens: list[int], logprobs: list[LogprobChunk]
    ) -> Finish | None:
        params, handle = sequence.request.params, sequence.handle
        assert params.max_new_tokens is not None
        if self.failing_token is not None and sequence.sent == self.failing_token[0]:
            return Finish(handle, "error", error=self.failing_token[1].info())
        if sequence.sent == params.max_new_tokens:
            return Finish(handle, "length")
        token = sequence.script[sequence.sent]
        sequence.sent += 1
        handles.append(handle)
        tokens.append(token)
        if sequence.request.num_top >= 0:
            logprobs.append(_logprob_chunk(handle, False, [token], sequence.request.num_top))
        if token in (params.stop_token_ids or []) or (token == EOS_ID and not params.ignore_eos):
            return Finish(handle, "stop", matched=token)
        if sequence.sent == params.max_new_tokens:
            return Finish(handle, "length")
        return None

    def _state(self, call: int) -> State:
        cards = self._states()
        return State(call, len(self.running), 0, 0, 9, 9, 0, 0, 9, 9, 9, 9, len(cards), self.steps, 0, cards)

    def _states(self) -> list[AdapterState]:
        return [
            AdapterState(name, path, version, "", False, "host", 8, 1, 0)
            for name, (path, version) in self.adapters.items()
        ]


def _prompt_logprobs(sequence: FakeSequence) -> list[LogprobChunk]:
    request = sequence.request
    if request.num_top < 0 or request.logprob_start_len < 0:
        return []
    ids = list(unpack_i32(request.input_ids))[request.logprob_start_len + 1 :]
    return [_logprob_chunk(sequence.handle, True, ids, request.num_top)]


def _logprob_chunk(handle: int, prompt: bool, ids: list[int], num_top: int) -> LogprobChunk:
    """Token t has logprob -t/2; the best candidates are ids 0, 1, … with logprobs 0, -0.5, …"""
    top_ids = list(range(num_top)) * len(ids)
    return LogprobChunk(
        handle,
        prompt,
        pack_i32(ids),
        pack_f32([-token / 2 for token in ids]),
        pack_i32(top_ids),
        pack_f32([-token / 2 for token in top_ids]),
    )


def pack_f32(values: list[float]) -> bytes:
    return array("f", values).tobytes()


def fake_model() -> ModelConfig:
    return parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 8,
            "intermediate_size": 8,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "bos_token_id": BOS_ID,
            "eos_token_id": EOS_ID,
        }
    )


def server_info(tokenizer_dir: Path) -> ServerInfo:
    return ServerInfo(
        fake_model(), "float32", "cpu", CONTEXT_LENGTH, 4096, 64, 1024, 64, tokenizer_dir=str(tokenizer_dir)
    )


@asynccontextmanager
async def fake_scheduler(run_dir: Path, context: zmq.Context[Any]) -> AsyncIterator[FakeScheduler]:
    """A fake at work at its end of pipe "front". It has not said ServerInfo yet."""
    address = pipe_address(run_dir, "front")
    pipe = Pipe(context, address, bind=True, sends=SchedulerToFront, receives=FrontToScheduler)
    scheduler = FakeScheduler(pipe)
    work = asyncio.create_task(scheduler.run())
    try:
        yield scheduler
        if work.done():
            work.result()
    finally:
        work.cancel()
        pipe.close()


@asynccontextmanager
async def fake_pair() -> AsyncIterator[tuple[FakeScheduler, Pipe[FrontToScheduler, SchedulerToFront]]]:
    """A fake at work, and the front's end of its pipe."""
    context: zmq.Context[Any] = zmq.Context()
    with TemporaryDirectory(prefix="ml-") as run_dir:
        async with fake_scheduler(Path(run_dir), context) as scheduler:
            address = pipe_address(run_dir, "front")
            pipe = Pipe(context, address, bind=False, sends=FrontToScheduler, receives=SchedulerToFront)
            try:
                yield scheduler, pipe
            finally:
                pipe.close()
        context.term()


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run a coroutine test in an event loop of its own, for at most 20 s."""

    @wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        async def bounded() -> None:
            async with asyncio.timeout(20):
                await test(*args, **kwargs)

        asyncio.run(bounded())

    return run


async def until(condition: Callable[[], object]) -> None:
    """Wait until `condition()` holds; the test's own time limit bounds it."""
    while not condition():
        await asyncio.sleep(0.002)
