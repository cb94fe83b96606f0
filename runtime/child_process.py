"""A child as its supervisor sees it: a process, the pipe to it, and what it said last."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import site
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

import manylora
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ErrorInfo, WorkerCrashedError
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import ChildToSupervisor, SupervisorToChild

# NVLink multicast is off: it needs privileges that containers rarely have, and fails late without them.
_ENVIRONMENT = {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


_LAST_WORDS_MS = 500  # how long to wait for the connection of a dead child to end; some never had one


class ChildProcess:
    """Started on construction: `python -m module <config file> args…`, in a process group of its own.

    The group keeps a terminal's Ctrl-C from the child, and lets `reap` take the child's own children along.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        config: ServerConfig,
        role: str,
        module: str,
        *,
        args: Sequence[str] = (),
        num_threads: int = 1,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.role = role
        self.epoch = config.epoch
        self.error: ErrorInfo | None = None
        self.pipe: Pipe[SupervisorToChild, ChildToSupervisor] = Pipe(
            context,
            pipe_address(config.run_dir, f"supervisor-{role}", config.epoch),
            bind=True,
            sends=SupervisorToChild,
            receives=ChildToSupervisor,
            epoch=config.epoch,
        )
        self._disconnected = self.pipe.socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        config_file = Path(config.run_dir) / f"{role}.{config.epoch}.json"
        config_file.write_bytes(msgspec.json.encode(config))
        self._process = subprocess.Popen(
            # -P: a file of the working directory must not pass for one of the modules the child imports.
            [sys.executable, "-P", "-m", module, str(config_file), *args],
            stdin=subprocess.DEVNULL,
            env=_environment(num_threads),
            pass_fds=pass_fds,
            process_group=0,
        )
        self.pid = self._process.pid
        self.pidfd = os.pidfd_open(self.pid)

    @property
    def exited(self) -> bool:
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return bool(poll.poll(0))

    @property
    def exit_code(self) -> int:
        """As subprocess has it: -9 after SIGKILL. Only after `reap`."""
        return self._process.returncode

    def exit_error(self) -> ErrorInfo:
        """Why it ended, in its own words if it had any. Only after `reap`."""
        if self.error is not None:
            return self.error
        code = self.exit_code
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"
        return WorkerCrashedError(f"process {self.role} {how}").info()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)

    def reap(self) -> None:
        """End what is left of its group and wait for it."""
        self.kill()  # before the wait: until then the group's number is surely ours
        self._process.wait()

    def last_words(self) -> list[ChildToSupervisor]:
        """What it said and nobody has read. Only after `reap`.

        Its last message may still be on its way through our ZeroMQ thread, which reports the connection's end after it.
        """
        self._disconnected.poll(_LAST_WORDS_MS)
        return self.pipe.drain()

    def close(self) -> None:
        self.pipe.socket.disable_monitor()
        self._disconnected.close()
        self.pipe.close()
        os.close(self.pidfd)


def _environment(num_threads: int) -> dict[str, str]:
    environment = {"OMP_NUM_THREADS": str(num_threads), **_ENVIRONMENT, **os.environ}
    root = str(Path(manylora.__file__ or "").absolute().parent.parent)
    if root not in (*site.getsitepackages(), site.getusersitepackages()):  # a tree that is not installed
        inherited = os.environ.get("PYTHONPATH")
        environment["PYTHONPATH"] = os.pathsep.join([root, inherited] if inherited else [root])
    return environment
