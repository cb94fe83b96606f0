"""The supervisor: starts every process of a server, watches them, ends them all.

One event loop over the children's pipes and exits; no state but what is below. The order of a start:

    front (answers 503) → prepare (finds the model) → scheduler, loader, workers → scheduler ready → front ready

Only the loader may die without ending the server: it is started again under the next epoch.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import zmq

from manylora.runtime.child_process import ChildProcess
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo, ManyloraError, ProtocolError
from manylora.runtime.messages import (
    ChildFailed,
    ChildReady,
    ChildToSupervisor,
    EngineFailed,
    LoaderRestarted,
    Prepared,
    Shutdown,
)
from manylora.runtime.scratch import make_run_dir, make_shm_dir

logger = logging.getLogger("manylora.supervisor")

MODULES = {
    "front": "manylora.runtime.front",
    "prepare": "manylora.runtime.prepare",
    "scheduler": "manylora.scheduler.process",
    "loader": "manylora.lora.loader",
    "worker": "manylora.tp_worker.worker",
}
GRACE_S = 5.0  # for a child that was told to end
MAX_LOADER_RESTARTS = 5  # more than these within a minute end the server


class Supervisor:
    """Runs one server from start to end in the thread that calls `run`.

    listener: the bound HTTP socket, handed to the front; None if the caller plays the front (`Engine`).
    on_prepared: called with the final config once the scheduler and the workers are started.
    on_failure: called with the error that ends the server, before anything is stopped.
    modules: what `python -m` runs for each role.
    wake_fd: what is written here wakes the event loop, as `signal.set_wakeup_fd` wants it.
    """

    def __init__(
        self,
        config: ServerConfig,
        listener: socket.socket | None = None,
        *,
        on_prepared: Callable[[ServerConfig], None] = lambda _: None,
        on_failure: Callable[[ErrorInfo], None] = lambda _: None,
        modules: Mapping[str, str] = MODULES,
    ) -> None:
        self._modules = modules
        self._listener = listener
        self._on_prepared = on_prepared
        self._on_failure = on_failure
        self._started = time.monotonic()
        self._zmq: zmq.Context[Any] = zmq.Context()
        self._poller = zmq.Poller()
        self._children: dict[str, ChildProcess] = {}
        self._ready: set[str] = set()
        self._prepared = False
        self._loader_deaths: list[float] = []
        self._stopping = False
        self._killing = False
        self._wake, self.wake_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poller.register(self._wake, zmq.POLLIN)
        self._config: ServerConfig = config

    def __del__(self) -> None:
        os.close(self._wake)  # not earlier: `stop` may come when all is over
        os.close(self.wake_fd)

    def stop(self) -> None:
        """Ask for an orderly end. May be called from any thread or signal handler; `run` returns when it is done."""
        self._stopping = True
        with contextlib.suppress(BlockingIOError):  # full: it is awake
            os.write(self.wake_fd, b"\0")

    def kill(self) -> None:
        """As `stop`, but waits for nothing."""
        self._killing = True
        self.stop()

    def run(self) -> ErrorInfo | None:
        """Start, watch and end everything. Returns the error that ended the server, or that a process ended with after
        `stop`, or None.

        When it returns, no process, socket or file of the server is left.
        """
        failure: ErrorInfo | None = None
        run_dir, shm_dir = make_run_dir(), make_shm_dir()
        try:
            self._config = msgspec.structs.replace(
                self._config,
                run_dir=str(run_dir.path),
                shm_dir=str(shm_dir.path),
                supervisor_pid=os.getpid(),
            )
            failure = self._run()
        finally:
            for child in self._children.values():
                child.reap()
                child.close()
            self._zmq.term()
            run_dir.remove()
            shm_dir.remove()
        return failure

    # ---- while it runs --------------------------------------------------------------------------------------------

    def _run(self) -> ErrorInfo | None:
        failure = None
        if self._listener is not None:
            self._start("front", str(self._listener.fileno()), pass_fds=[self._listener.fileno()])
            self._listener.close()  # the front's alone now: when it dies, clients are told so
        self._start("prepare")
        while failure is None and not self._stopping:
            self._sleep(self._poller)
            try:
                self._handle_messages()
                failure = self._handle_exits()
            except ManyloraError as error:
                failure = error.info()
            except OSError as error:  # no more processes or descriptors allowed, no room for the config file
                failure = ConfigError(f"a process cannot be started: {error}").info()
        if failure is None:
            failure = self._end_orderly()
        else:
            self._on_failure(failure)
            self._end_after(failure)
        return failure

    def _sleep(self, poller: zmq.Poller, seconds: float | None = None) -> None:
        """Until something happens; `stop` and signals wake it."""
        poller.poll(None if seconds is None else int(seconds * 1000) + 1)
        with contextlib.suppress(BlockingIOError):
            os.read(self._wake, 4096)

    def _handle_messages(self) -> None:
        for child in list(self._children.values()):
            for message in child.pipe.drain():
                self._handle(child, message)

    def _handle(self, child: ChildProcess, message: ChildToSupervisor) -> None:
        match message:
            case ChildFailed():
                child.error = message.error
            case ChildReady():
                self._ready.add(child.role)
                if child.role == "front":
                    self._log_ready()
            case Prepared():
                self._config = message.config
                self._prepared = True
                self._start_engine()
                self._on_prepared(self._config)

    def _handle_exits(self) -> ErrorInfo | None:
        """Reap what has ended. The error if the server cannot go on without it."""
        dead = [child for child in self._children.values() if child.exited]
        for child in dead:
            self._forget(child)
        for child in list(dead):
            if child.role == "prepare" and child.error is None and child.exit_code == 0 and self._prepared:
                dead.remove(child)
            if child.role == "loader" and self._restart_loader(child):
                dead.remove(child)
        # A process that was shot is the cause, one that complains of a lost peer the consequence.
        dead.sort(key=lambda child: child.exit_code >= 0)
        return dead[0].exit_error() if dead else None

    # ---- starting -------------------------------------------------------------------------------------------------

    def _start(
        self, role: str, *args: str, epoch: int = 0, num_threads: int = 1, pass_fds: Sequence[int] = ()
    ) -> None:
        child = ChildProcess(
            self._zmq,
            msgspec.structs.replace(self._config, epoch=epoch),
            role,
            self._modules[role.rstrip("0123456789")],
            args=args,
            num_threads=num_threads,
            pass_fds=pass_fds,
        )
        self._children[role] = child
        self._poller.register(child.pipe.socket, zmq.POLLIN)
        self._poller.register(child.pidfd, zmq.POLLIN)

    def _start_engine(self) -> None:
        tp_size = self._config.parallel.tp_size
        self._start("scheduler")
        self._start("loader")
        for rank in range(tp_size):
            num_threads = max(1, len(os.sched_getaffinity(0)) // tp_size)
            self._start(f"worker{rank}", str(rank), num_threads=num_threads)

    def _restart_loader(self, dead: ChildProcess) -> bool:
        """Start the next loader; False without a scheduler that works with it, or if they die too often."""
        if "scheduler" not in self._ready or "scheduler" not in self._children:
            return False
        now = time.monotonic()
        self._loader_deaths = [death for death in self._loader_deaths if now - death < 60] + [now]
        if len(self._loader_deaths) > MAX_LOADER_RESTARTS:
            return False
        epoch = dead.epoch + 1
        self._children["scheduler"].pipe.send(LoaderRestarted(epoch))
        self._start("loader", epoch=epoch)
        # Last: who loads an adapter because of this line finds a scheduler that was told, though it may not have read it.
        logger.warning("%s; it is started again", dead.exit_error().message)
        return True

    def _log_ready(self) -> None:
        config, seconds = self._config, time.monotonic() - self._started
        logger.info(
            "ready at http://%s:%d after %.1f s: %s, tp %d on %s in %s, %d adapters",
            config.http.host,
            config.http.port,
            seconds,
            config.model.model_path,
            config.parallel.tp_size,
            config.model.device,
            config.model.dtype,
            len(config.lora.lora_paths),
            extra={"host": config.http.host, "port": config.http.port, "seconds": round(seconds, 3)},
        )

    # ---- ending ---------------------------------------------------------------------------------------------------

    def _end_orderly(self) -> ErrorInfo | None:
        """The front answers what waits, the scheduler ends the engine. What does not end in time is killed by `run`.

        Returns what a process complained of while it ended, such as the scheduler of its books.
        """
        logger.info("shutting down")
        self._tell("front", Shutdown())
        if "scheduler" in self._ready:
            self._tell("scheduler", Shutdown())
            self._await_exits(set(self._children))
        else:  # a worker that loads would not listen
            self._kill_all_but("front")
            self._await_exits({"front"})
        for child in [child for child in self._children.values() if child.exited]:
            self._forget(child)
            if child.error is not None:
                return child.error
        return None

    def _end_after(self, failure: ErrorInfo) -> None:
        """Workers that wait for a dead peer in a collective never listen: kill all; the front answers honestly."""
        self._kill_all_but("front")
        self._tell("front", EngineFailed(failure))
        self._await_exits({"front"})

    def _tell(self, role: str, message: Shutdown | EngineFailed) -> None:
        if role in self._children:
            try:
                self._children[role].pipe.send(message)
            except ProtocolError:  # it has not connected yet: nobody waits for its answer
                self._children[role].kill()

    def _kill_all_but(self, role: str) -> None:
        for child in self._children.values():
            if child.role != role:
                child.kill()

    def _await_exits(self, roles: set[str]) -> None:
        """Wait until these children have ended, for at most the grace period and not after `kill`."""
        deadline = time.monotonic() + GRACE_S
        poller = zmq.Poller()
        poller.register(self._wake, zmq.POLLIN)
        waiting = [self._children[role] for role in roles if role in self._children]
        for child in waiting:
            poller.register(child.pidfd, zmq.POLLIN)
        while waiting and not self._killing and (left := deadline - time.monotonic()) > 0:
            self._sleep(poller, left)
            for child in [child for child in waiting if child.exited]:
                poller.unregister(child.pidfd)
                waiting.remove(child)

    def _forget(self, child: ChildProcess) -> None:
        child.reap()
        for message in child.last_words():
            self._handle(child, message)
        self._poller.unregister(child.pipe.socket)
        self._poller.unregister(child.pidfd)
        child.close()
        del self._children[child.role]
