"""What every process started by the supervisor does first and last.

First: read the config file, name the log, promise to die with the supervisor, connect its pipe. Last: tell the
supervisor in one line why it ends. In between runs the `main` of the process.

    if __name__ == "__main__":
        run_child("loader", sys.argv[1:], main)  # main(config, context)
"""

from __future__ import annotations

import ctypes
import faulthandler
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import zmq

from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ErrorInfo, ManyloraError
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.log import setup_logging
from manylora.runtime.messages import ChildFailed, ChildReady, ChildToSupervisor, SupervisorToChild

logger = logging.getLogger("manylora.child")

_PR_SET_PDEATHSIG = 1


class ChildContext:
    """What a child's `main` gets besides the config.

    role: its name in logs and pipe names ("front", "scheduler", "loader", "worker0", …).
    args: the command line after the config file (a worker's rank, the front's socket).
    zmq: the process's ZeroMQ context.
    supervisor: the pipe to the supervisor; poll it where the process waits for anything.
    """

    def __init__(self, role: str, config: ServerConfig, args: tuple[str, ...]) -> None:
        self.role = role
        self.args = args
        self.zmq: zmq.Context[Any] = zmq.Context()
        self._config = config
        # A context of its own: `close` may end it whatever the state of the process's other sockets.
        self._supervisor_zmq: zmq.Context[Any] = zmq.Context()
        self.supervisor: Pipe[ChildToSupervisor, SupervisorToChild] = Pipe(
            self._supervisor_zmq,
            pipe_address(config.run_dir, f"supervisor-{role}", config.epoch),
            bind=False,
            sends=ChildToSupervisor,
            receives=SupervisorToChild,
            epoch=config.epoch,
        )

    def connect(self, name: str, *, sends: Any, receives: Any) -> Pipe[Any, Any]:
        """Connect to pipe `name` of the scheduler, in the epoch this process was started in."""
        epoch = self._config.epoch
        address = pipe_address(self._config.run_dir, name, epoch)
        return Pipe(self.zmq, address, bind=False, sends=sends, receives=receives, epoch=epoch)

    def ready(self) -> None:
        """Tell the supervisor that this process serves."""
        self.supervisor.send(ChildReady())

    def close(self) -> None:
        """Deliver what was sent to the supervisor (for at most the pipe's linger time)."""
        self.supervisor.close()
        self._supervisor_zmq.term()


def run_child(role: str, argv: list[str], main: Callable[[ServerConfig, ChildContext], None]) -> NoReturn:
    """Run `main` as a child of the supervisor and exit: 0 if it returns, 1 after telling why it failed.

    `main` closes what must be closed: there is no interpreter teardown (no atexit). `argv` is the config file followed by what `main` finds in `context.args`.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # what an interrupt means, the supervisor decides
    faulthandler.enable()
    config = msgspec.json.decode(Path(argv[0]).read_bytes(), type=ServerConfig)
    _die_with_parent(config.supervisor_pid)
    setup_logging(role, config.log_level, config.log_format)
    context = ChildContext(role, config, tuple(argv[1:]))
    try:
        main(config, context)
    except Exception as error:
        if isinstance(error, ManyloraError):
            info = error.info()
        else:
            logger.exception("unexpected error")
            info = ErrorInfo(ManyloraError.code, _one_line(error), ManyloraError.status)
        context.supervisor.send(ChildFailed(info))
        context.close()
        _exit(1)
    context.close()
    _exit(0)


def _die_with_parent(supervisor_pid: int) -> None:
    """Have the kernel kill this process when the supervisor ends, however it ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if supervisor_pid and os.getppid() != supervisor_pid:  # it died before the promise was made
        os._exit(1)


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _exit(code: int) -> NoReturn:
    """Exit past the interpreter's teardown: it may wait for a thread that hangs in a collective, and takes seconds to
    free what the kernel frees at once."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
