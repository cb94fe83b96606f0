"""The front's end of the pipe to the scheduler: drained by the event loop, questions matched to answers by number."""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Callable

from manylora.runtime.errors import ManyloraError, NotReadyError, ProtocolError
from manylora.runtime.ipc import Pipe
from manylora.runtime.messages import (
    AdapterReply,
    Done,
    FrontToScheduler,
    Rejected,
    SchedulerToFront,
    ServerInfo,
    State,
    StepOutput,
)

logger = logging.getLogger("manylora.front")

Reply = AdapterReply | Done | State


class SchedulerClient:
    """Lives in one event loop; every method is called there.

    failure: why nothing can be answered any more, or None. `failed` is set with it.
    """

    def __init__(
        self,
        pipe: Pipe[FrontToScheduler, SchedulerToFront],
        on_output: Callable[[StepOutput | Rejected], None],
        on_failure: Callable[[ManyloraError], None],
    ) -> None:
        """`on_output` gets whatever concerns sequences, in order; `on_failure` is called once, with the failure."""
        self.failure: ManyloraError | None = None
        self.failed = asyncio.Event()
        self._pipe = pipe
        self._on_output = on_output
        self._on_failure = on_failure
        self._loop = asyncio.get_running_loop()
        self._info: asyncio.Future[ServerInfo] = self._loop.create_future()
        self._call_numbers = itertools.count(1)
        self._asked: dict[int, asyncio.Future[Reply]] = {}  # by call number
        self._loop.add_reader(pipe.fileno(), self._read)
        self._loop.call_soon(self._read)  # the descriptor tells only of what comes from now on

    @property
    def info(self) -> ServerInfo:
        """Raises NotReadyError before the scheduler's first message."""
        if not self._info.done():
            raise NotReadyError("The server is still starting.")
        return self._info.result()

    async def wait_info(self) -> ServerInfo:
        """The scheduler's first message. Raises the failure that came instead."""
        return await asyncio.shield(self._info)

    def send(self, message: FrontToScheduler) -> None:
        """Raises the failure, if there is one; a pipe that is full becomes it."""
        self.check_alive()
        try:
            self._pipe.send(message)
        except ProtocolError as error:
            self.fail(error)
            raise
        self._loop.call_soon(self._read)  # a send may swallow the descriptor's edge

    async def ask(self, make_question: Callable[[int], FrontToScheduler]) -> Reply:
        """Send the message made for a fresh call number and wait for its answer. A caller may leave at any time."""
        number = next(self._call_numbers)
        future: asyncio.Future[Reply] = self._loop.create_future()
        self._asked[number] = future
        try:
            self.send(make_question(number))
            return await future
        finally:
            self._asked.pop(number, None)

    def check_alive(self) -> None:
        if self.failure is not None:
            raise self.failure

    def fail(self, error: ManyloraError) -> None:
        """Answer every question, now and later, with `error`. The first one stays."""
        if self.failure is not None:
            return
        self.failure = error
        self._loop.remove_reader(self._pipe.fileno())
        for waiting in (self._info, *self._asked.values()):
            if not waiting.done():
                waiting.set_exception(error)
                waiting.exception()  # marks it as seen: nobody may be waiting
        self._on_failure(error)
        self.failed.set()

    def _read(self) -> None:
        if self.failure is not None:
            return
        try:
            for message in self._pipe.drain():
                self._handle(message)
        except ProtocolError as error:
            self.fail(error)
        except Exception:  # a fault of ours: better an error for everyone than calls that never end
            logger.exception("a message of the scheduler could not be applied")
            self.fail(ManyloraError("Internal error; see the server's log."))

    def _handle(self, message: SchedulerToFront) -> None:
        if isinstance(message, StepOutput | Rejected):
            self._on_output(message)
        elif isinstance(message, ServerInfo):
            self._info.set_result(message)
        elif (future := self._asked.get(message.call)) and not future.done():
            future.set_result(message)
