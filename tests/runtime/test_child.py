"""What a child process does first and last, seen from the supervisor's end of its pipe."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import zmq

from manylora.runtime.child_process import ChildProcess
from manylora.runtime.config import ModelArgs, ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo, ManyloraError
from manylora.runtime.messages import ChildFailed, ChildReady, ChildToSupervisor, Shutdown
from tests.runtime.fakes import REPOSITORY


@pytest.fixture
def config(short_dir: Path) -> ServerConfig:
    return ServerConfig(model=ModelArgs(model_path="m"), run_dir=str(short_dir), supervisor_pid=os.getpid())


@pytest.fixture
def start(config: ServerConfig, monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    """Starts `tests.runtime.fakes <file> <behaviour>` as a child."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    children: list[ChildProcess] = []
    with zmq.Context() as context:

        def start(behaviour: str) -> ChildProcess:
            child = ChildProcess(context, config, "worker0", "tests.runtime.fakes", args=[behaviour])
            children.append(child)
            return child

        yield start
        for child in children:
            child.reap()
            child.close()
            assert child.exited


def next_message(child: ChildProcess) -> ChildToSupervisor:
    assert child.pipe.wait(10_000)
    message = child.pipe.recv()
    assert message is not None
    return message


def wait_for_exit(child: ChildProcess) -> int:
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    child.reap()
    return child.exit_code


def ends_within(pidfd: int, seconds: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    ended = bool(poll.poll(seconds * 1000))
    os.close(pidfd)
    return ended


def test_ready_then_shutdown(start) -> None:
    child = start("serve")
    assert next_message(child) == ChildReady()
    child.pipe.send(Shutdown())
    assert wait_for_exit(child) == 0


def test_an_error_of_ours_is_told_without_traceback(start, capfd: pytest.CaptureFixture[str]) -> None:
    child = start("refuse")
    assert next_message(child) == ChildFailed(ConfigError("the moon is full", param="moon").info())
    assert wait_for_exit(child) == 1
    assert "Traceback" not in capfd.readouterr().err


def test_any_other_error_is_logged_and_told_in_one_line(start, capfd: pytest.CaptureFixture[str]) -> None:
    child = start("break")
    message = next_message(child)
    assert message == ChildFailed(ErrorInfo(ManyloraError.code, "ZeroDivisionError: one two", 500))
    assert wait_for_exit(child) == 1
    assert "Traceback" in capfd.readouterr().err


def test_a_thread_that_hangs_does_not_keep_a_failed_child_alive(start) -> None:
    child = start("refuse-with-thread")
    assert isinstance(next_message(child), ChildFailed)
    assert wait_for_exit(child) == 1


def test_the_terminals_interrupt_is_the_supervisors_to_handle(start) -> None:
    child = start("serve")
    assert next_message(child) == ChildReady()
    os.kill(child.pid, signal.SIGINT)
    child.pipe.send(Shutdown())
    assert wait_for_exit(child) == 0


def test_the_way_it_died_is_named(start) -> None:
    child = start("serve")
    assert next_message(child) == ChildReady()
    child.kill()
    assert wait_for_exit(child) == -signal.SIGKILL
    assert child.exit_error() == ErrorInfo("worker_crashed", "process worker0 was killed by SIGKILL", 500)


def test_children_of_the_child_end_with_it(start) -> None:
    child = start("fork")
    message = next_message(child)
    assert isinstance(message, ChildFailed)  # its way to tell a number
    left_behind = os.pidfd_open(int(message.error.message))
    assert wait_for_exit(child) == 0
    assert ends_within(left_behind, 2)


def test_it_dies_with_its_supervisor(config: ServerConfig, short_dir: Path) -> None:
    """Killed hard, the supervisor has no last word: the kernel tells the child."""
    script = (
        "import sys, zmq, msgspec, os\n"
        "from manylora.runtime.child_process import ChildProcess\n"
        "from manylora.runtime.config import ServerConfig\n"
        "config = msgspec.json.decode(sys.argv[1], type=ServerConfig)\n"
        "config = msgspec.structs.replace(config, supervisor_pid=os.getpid())\n"
        "child = ChildProcess(zmq.Context(), config, 'worker0', 'tests.runtime.fakes', args=['serve'])\n"
        "assert child.pipe.wait(10_000)\n"
        "sys.stdout.write(f'{child.pid}\\n')\n"
        "sys.stdout.flush()\n"
        "sys.stdin.read()\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY / '.pkg'}:{REPOSITORY}"}
    with subprocess.Popen(
        [sys.executable, "-c", script, msgspec.json.encode(config).decode()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as supervisor:
        assert supervisor.stdout is not None
        orphan = os.pidfd_open(int(supervisor.stdout.readline()))
        supervisor.kill()
    assert ends_within(orphan, 5)


def test_the_last_words_of_a_child_are_heard_after_its_end(start) -> None:
    """They may still be on their way when its exit is seen."""
    child = start("refuse")
    wait_for_exit(child)
    assert child.last_words() == [ChildFailed(ConfigError("the moon is full", param="moon").info())]
