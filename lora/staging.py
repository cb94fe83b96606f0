"""The thread that reads adapter images into host pages beside a worker's step loop."""

from __future__ import annotations

import contextlib
import logging
import queue
import socket
import threading

from manylora.lora.weight_pool import WeightPool
from manylora.runtime.errors import ManyloraError
from manylora.runtime.messages import AdapterStaged, DropAdapter, StageAdapter, unpack_i32

logger = logging.getLogger("manylora.lora")


class StagingThread:
    """Runs StageAdapter and DropAdapter commands in the order given.

    Poll `fileno()`: it is readable while `drain()` has answers. A command that fails is answered with its error.
    """

    def __init__(self, pool: WeightPool, tp_rank: int) -> None:
        self._pool = pool
        self._tp_rank = tp_rank
        self._commands: queue.SimpleQueue[StageAdapter | DropAdapter | None] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[AdapterStaged] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="staging", daemon=True)
        self._thread.start()

    def submit(self, command: StageAdapter | DropAdapter) -> None:
        self._commands.put(command)

    def fileno(self) -> int:
        return self._wake_read.fileno()

    def drain(self) -> list[AdapterStaged]:
        """The answers that are here now, in order. Never waits."""
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        answers: list[AdapterStaged] = []
        with contextlib.suppress(queue.Empty):
            while True:
                answers.append(self._answers.get_nowait())
        return answers

    def close(self) -> None:
        """Finish what was submitted, then end the thread."""
        self._commands.put(None)
        self._thread.join()
        self._wake_read.close()
        self._wake_write.close()

    def _run(self) -> None:
        while (command := self._commands.get()) is not None:
            if isinstance(command, DropAdapter):
                self._pool.forget(command.version)
                continue
            self._answers.put(self._stage(command))
            with contextlib.suppress(BlockingIOError):  # full: the loop is being woken anyway
                self._wake_write.send(b"\0")

    def _stage(self, command: StageAdapter) -> AdapterStaged:
        try:
            self._pool.stage(
                command.version,
                command.path,
                command.ranks,
                command.scalings,
                unpack_i32(command.host_pages),
                self._tp_rank,
            )
        except Exception as error:  # one bad image must not end the thread
            logger.exception("staging version %d failed", command.version)
            message = f"rank {self._tp_rank} could not stage the adapter: {error}"
            return AdapterStaged(self._tp_rank, command.version, ManyloraError(message).info())
        return AdapterStaged(self._tp_rank, command.version)
