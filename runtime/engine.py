"""The server without HTTP: `Engine` in a Python program, with the same processes behind it.

    with Engine(model_path="demo/model", lora_paths={"json": "demo/adapters/json"}) as engine:
        print(engine.generate("The capital of France is", {"max_new_tokens": 8}, lora_path="json")["text"])

The caller's process plays the front: a thread with an event loop holds the tokenizer and the pipe to the scheduler.
"""

from __future__ import annotations

import asyncio
import atexit
import threading
from collections.abc import Coroutine, Iterator, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec
import uvloop
import zmq

from manylora.runtime.adapter_types import (
    AdapterCard,
    DeleteAdapterBody,
    LoadOptions,
    PatchAdapterBody,
)
from manylora.runtime.api_types import GenerateBody, LoadAdapterBody, UnloadAdapterBody, convert_body
from manylora.runtime.config import AccessArgs
from manylora.runtime.errors import (
    BadRequestError,
    ConfigError,
    ErrorInfo,
    ManyloraError,
    ShuttingDownError,
    error_from,
)
from manylora.runtime.flags import config_from_kwargs
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.launch import launch
from manylora.runtime.messages import AdapterReply, FrontToScheduler, SchedulerToFront, State
from manylora.runtime.sampling_params import SamplingParams
from manylora.runtime.server_info import describe_server
from manylora.tokenizer_manager.answer import Answer
from manylora.tokenizer_manager.generate_call import GenerateCall
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager

T = TypeVar("T")
Params = SamplingParams | dict[str, Any]


class Engine:
    """One server, from construction to `shutdown` (or the end of its `with` block, or of the program).

    Methods may be called from any thread. Every refusal is a `ManyloraError`: `AdapterNotFoundError`,
    `ContextLengthError`, …
    """

    def __init__(self, model_path: str, **flags: Any) -> None:
        """Start and wait until it serves. `flags`: those of `manylora serve` with underscores (`tp_size=2`).

        Raises ConfigError, or what made the start fail.
        """
        self._config = config_from_kwargs(model_path=model_path, **flags)
        if self._config.access != AccessArgs():
            raise ConfigError(
                "Engine serves no HTTP: flags about keys, --adapter-root and --allow-hub mean nothing to it"
            )
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="manylora-front", daemon=True)
        self._thread.start()
        self._zmq: zmq.Context[Any] = zmq.Context()
        self._lock = threading.Lock()
        self._manager: TokenizerManager | None = None
        self._pipe: Pipe[FrontToScheduler, SchedulerToFront] | None = None
        self._failure: ManyloraError | None = None
        self._server = None
        atexit.register(self.shutdown)
        try:
            self._server = launch(self._config, on_failure=self._fail_soon)
            self._config = self._server.config
            self._run(self._connect())
        except BaseException:
            self.shutdown()
            raise

    # ---- text -----------------------------------------------------------------------------------------------------

    def generate(
        self,
        text: str | Sequence[str] | None = None,
        sampling_params: Params | Sequence[Params] | None = None,
        *,
        prompt: str | Sequence[str] | None = None,
        input_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        stream: bool = False,
        rid: str | Sequence[str] | None = None,
        return_logprob: bool | Sequence[bool] = False,
        top_logprobs_num: int | Sequence[int] = 0,
        logprob_start_len: int | Sequence[int] = -1,
        return_text_in_logprobs: bool = False,
    ) -> Any:
        """What `POST /generate` answers: a dictionary, or a list of them for a list or n > 1.

        `prompt` is another name of `text`. With `stream` an iterator of dictionaries, each with all of one answer's
        text so far; closing it aborts what still runs.
        """
        if text is not None and prompt is not None:
            raise BadRequestError("text and prompt are two names of one value; give one.", param="prompt")
        fields = {
            "text": text if prompt is None else prompt,
            "input_ids": input_ids,
            "sampling_params": sampling_params,
            "lora_path": lora_path,
            "rid": rid,
            "return_logprob": return_logprob,
            "top_logprobs_num": top_logprobs_num,
            "logprob_start_len": logprob_start_len,
            "return_text_in_logprobs": return_text_in_logprobs,
        }
        call = convert_body(fields, GenerateBody).to_call()
        if stream:
            return self._stream(call)
        answers = [answer.to_dict() for answer in self._run(self._front().generate(call))]
        return answers if call.answers_list else answers[0]

    def _stream(self, call: GenerateCall) -> Iterator[dict[str, Any]]:
        changes = self._front().stream(call)

        async def next_changes() -> list[Answer]:
            ended: list[Answer] = []
            return await anext(changes, ended)

        try:
            while answers := self._run(next_changes()):
                yield from (answer.to_dict() for answer in answers)
        finally:
            if self._thread.is_alive():
                self._run(changes.aclose())

    # ---- administration -------------------------------------------------------------------------------------------

    def load_lora_adapter(
        self,
        lora_name: str,
        lora_path: str,
        pinned: bool = False,
        replace: bool = False,
        *,
        if_version: int | None = None,
        ttl_s: float | None = None,
    ) -> dict[str, str]:
        """Load an adapter from a directory or hub id. Returns name -> path of all loaded ones, in load order.

        `if_version`: only if the name is at this version, 0 if it is not loaded; else VersionConflictError. `ttl_s`: unload
        it when no request has used it for so many seconds, pinned or not.
        """
        fields = {"lora_name": lora_name, "lora_path": lora_path, "pinned": pinned, "replace": replace}
        body = convert_body(fields, LoadAdapterBody)
        options = convert_body({"if_version": if_version, "ttl_s": ttl_s}, LoadOptions)
        return _done(
            self._run(
                self._front().load_adapter(
                    body.lora_name,
                    body.lora_path,
                    pinned=body.pinned,
                    replace=body.replace,
                    if_version=options.if_version,
                    ttl_s=options.ttl_s,
                )
            )
        ).loaded

    def list_lora_adapters(self) -> list[dict[str, Any]]:
        """What `GET /v1/adapters` lists: one dictionary per loaded adapter, in load order."""
        return [msgspec.to_builtins(AdapterCard.of(state)) for state in self.state().adapters]

    def update_lora_adapter(
        self,
        lora_name: str,
        *,
        pinned: bool | None = None,
        ttl_s: float | msgspec.UnsetType | None = msgspec.UNSET,
        if_version: int | None = None,
    ) -> dict[str, Any]:
        """Change the pin or the time limit (None: none) of a loaded adapter. Returns its state as `list_lora_adapters`."""
        fields = {"pinned": msgspec.UNSET if pinned is None else pinned, "ttl_s": ttl_s}
        given = {name: value for name, value in fields.items() if value is not msgspec.UNSET}
        name = convert_body({"lora_name": lora_name}, UnloadAdapterBody).lora_name
        body = convert_body({**given, "if_version": if_version}, PatchAdapterBody)
        body.check()
        reply = self._run(
            self._front().update_adapter(name, pinned=body.pin, ttl_s=body.ttl_s, if_version=body.if_version)
        )
        return _card(reply)

    def pin_lora_adapter(self, lora_name: str, pinned: bool = True) -> dict[str, Any]:
        """Keep a loaded adapter in device memory, or no longer. Returns its state as `list_lora_adapters`."""
        return self.update_lora_adapter(lora_name, pinned=pinned)

    def unload_lora_adapter(
        self,
        lora_name: str,
        *,
        drain_s: float | None = None,
        force: bool = False,
        if_version: int | None = None,
    ) -> dict[str, str]:
        """Returns when the last request that uses it has ended: name -> path of those still loaded.

        After `drain_s` seconds, with `force` at once, the requests that still use it get AdapterUnloadedError.
        """
        name = convert_body({"lora_name": lora_name}, UnloadAdapterBody).lora_name
        fields = {"drain_s": drain_s, "force": force, "if_version": if_version}
        body = convert_body(fields, DeleteAdapterBody)
        unload = self._front().unload_adapter(name, drain_s=body.patience, if_version=body.if_version)
        return _done(self._run(unload)).loaded

    def flush_cache(self) -> None:
        """Forget all cached prefixes. Raises BusyError while requests run."""
        self._run(self._front().flush_cache())

    def state(self) -> State:
        """The scheduler's ledger: pages, leases, adapters."""
        return self._run(self._front().state())

    def get_server_info(self) -> dict[str, Any]:
        """What `GET /get_server_info` answers."""
        return describe_server(self._config, self._front().info, self.state())

    # ---- end ------------------------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """End every process; whatever still waits gets ShuttingDownError. May be called more than once."""
        with self._lock:
            if not self._thread.is_alive():
                return
            atexit.unregister(self.shutdown)
            self._run(self._disconnect())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._zmq.term()
            if self._server is not None:
                self._server.stop()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()

    # ---- the event loop's side ------------------------------------------------------------------------------------

    async def _connect(self) -> None:
        epoch = self._config.epoch
        self._pipe = Pipe(
            self._zmq,
            pipe_address(self._config.run_dir, "front", epoch),
            bind=False,
            sends=FrontToScheduler,
            receives=SchedulerToFront,
            epoch=epoch,
        )
        self._manager = TokenizerManager(self._pipe)
        if self._failure is not None:
            self._manager.fail(self._failure)
        await self._manager.start()

    async def _disconnect(self) -> None:
        if self._manager is None or self._pipe is None:
            return
        self._manager.close()
        waiting = asyncio.all_tasks() - {asyncio.current_task()}
        if waiting:
            await asyncio.wait(waiting)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()
        self._pipe.close()

    def _fail_soon(self, error: ErrorInfo) -> None:
        """A process died: told by the supervising thread."""

        def fail() -> None:
            self._failure = error_from(error)
            if self._manager is not None:
                self._manager.fail(self._failure)

        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(fail)

    def _front(self) -> TokenizerManager:
        if self._manager is None or not self._thread.is_alive():
            raise ShuttingDownError("The engine was shut down.")
        return self._manager

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the event loop and wait. Ctrl-C cancels it, which aborts its requests."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise


def _done(reply: AdapterReply) -> AdapterReply:
    """The reply to a call that was not refused. Raises the refusal."""
    if reply.error is not None:
        raise error_from(reply.error)
    return reply


def _card(reply: AdapterReply) -> dict[str, Any]:
    state = _done(reply).adapter
    assert state is not None
    return msgspec.to_builtins(AdapterCard.of(state))
