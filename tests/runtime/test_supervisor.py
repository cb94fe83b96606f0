"""The supervisor, with fakes for children: what is started and told in which order, and that nothing is ever left."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manylora.runtime import supervisor as supervisor_module
from manylora.runtime.config import ModelArgs, ParallelArgs, ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo
from manylora.runtime.launch import bind, launch
from manylora.runtime.supervisor import Supervisor
from tests.runtime.fake_server import MODULES
from tests.runtime.fakes import REPOSITORY

CONFIG = ServerConfig(model=ModelArgs(model_path="m"), parallel=ParallelArgs(tp_size=2))
ALL = {"front 0", "prepare 0", "scheduler 0", "loader 0", "worker0 0", "worker1 0"}


class House:
    """One supervisor in a thread, and what its children wrote down."""

    def __init__(self, directory: Path) -> None:
        self._log = directory / "log"
        self._listener = bind("127.0.0.1", 0)
        self._directory = directory
        self._thread: threading.Thread | None = None
        self.failure: ErrorInfo | None = None

    def start(self) -> None:
        self.supervisor = Supervisor(CONFIG, self._listener, modules=MODULES)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.failure = self.supervisor.run()

    @property
    def lines(self) -> list[str]:
        return self._log.read_text().splitlines() if self._log.exists() else []

    def wait_for(self, *lines: str) -> None:
        deadline = time.monotonic() + 30
        while not set(lines) <= set(self.lines):
            assert time.monotonic() < deadline, self.lines
            time.sleep(0.02)

    def wait_until_started(self) -> None:
        self.wait_for(*(f"{child} started" for child in ALL))

    def let_die(self) -> None:
        """The children that were asked to die, do."""
        (next(self._directory.glob("manylora-*")) / "die").touch()

    def join(self, seconds: float = 30) -> float:
        """Wait for the end; how long it took."""
        assert self._thread is not None
        began = time.monotonic()
        self._thread.join(seconds)
        assert not self._thread.is_alive()
        return time.monotonic() - began

    def close(self) -> None:
        if self._thread is not None and self._thread.is_alive():
            self.supervisor.kill()
            self._thread.join()
        self._listener.close()
        assert not list(self._directory.glob("manylora-*")), "the run directory is left"


@pytest.fixture
def house(short_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    monkeypatch.setenv("FAKE_LOG", str(short_dir / "log"))
    house = House(short_dir)
    yield house
    house.close()


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """`fake(role, behaviour)`."""
    return lambda role, behaviour: monkeypatch.setenv(f"FAKE_{role.upper()}", behaviour)


def test_front_and_scheduler_are_told_and_the_scheduler_ends_the_rest(house: House) -> None:
    house.start()
    house.wait_until_started()
    time.sleep(0.3)  # until the scheduler has said that it is ready
    house.supervisor.stop()
    house.join()
    assert house.failure is None
    told = [line.removesuffix(" was told to end") for line in house.lines if "told" in line]
    assert sorted(told) == ["front", "loader", "scheduler", "worker0", "worker1"]
    assert told.index("scheduler") < told.index("worker0")


def test_a_complaint_at_the_end_is_told(house: House, fake: Callable[[str, str], None]) -> None:
    fake("scheduler", "complain")
    house.start()
    house.wait_until_started()
    time.sleep(0.3)
    house.supervisor.stop()
    assert house.join() < supervisor_module.GRACE_S
    assert house.failure == ErrorInfo("bad_config", "scheduler complains", 400)


def test_a_refusal_ends_the_start(house: House, fake: Callable[[str, str], None]) -> None:
    fake("prepare", "refuse")
    house.start()
    house.join()
    assert house.failure == ErrorInfo("bad_config", "prepare refuses", 400)
    assert not [line for line in house.lines if line.startswith(("scheduler", "worker", "loader"))]


def test_a_preparation_without_a_result_ends_the_start(
    house: House, fake: Callable[[str, str], None]
) -> None:
    fake("prepare", "end")
    house.start()
    house.join()
    assert house.failure == ErrorInfo("worker_crashed", "process prepare exited with code 0", 500)


def test_a_scheduler_that_dies_with_its_loader_ends_the_server(
    house: House, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake("scheduler", "die")
    fake("loader", "die")
    house.start()
    house.wait_until_started()
    time.sleep(0.3)  # until the scheduler has said that it is ready
    handle_exits = Supervisor._handle_exits

    def late(supervisor: Supervisor) -> ErrorInfo | None:
        """Look at the exits once both are there."""
        time.sleep(0.5)
        return handle_exits(supervisor)

    monkeypatch.setattr(Supervisor, "_handle_exits", late)
    house.let_die()
    house.join()
    assert house.failure is not None
    assert house.failure.message in (
        "process scheduler was killed by SIGKILL",
        "process loader was killed by SIGKILL",
    )
    assert f"front was told: {house.failure.message}" in house.lines


@pytest.mark.parametrize("role", ["worker1", "scheduler", "front"])
def test_a_death_ends_the_server_and_the_front_hears_why(
    house: House, fake: Callable[[str, str], None], role: str
) -> None:
    fake(role, "die")
    fake("worker0", "ignore")  # as one that waits in a collective
    house.start()
    house.wait_until_started()
    house.let_die()
    assert house.join() < 3
    message = f"process {role} was killed by SIGKILL"
    assert house.failure == ErrorInfo("worker_crashed", message, 500)
    assert (f"front was told: {message}" in house.lines) == (role != "front")


def test_the_loader_is_started_again(house: House, fake: Callable[[str, str], None]) -> None:
    fake("loader", "die-once")
    house.start()
    house.wait_until_started()
    time.sleep(0.3)
    house.let_die()
    house.wait_for("loader 1 started", "scheduler was told of loader 1")
    house.supervisor.kill()
    house.join()
    assert house.failure is None


def test_a_loader_that_keeps_dying_ends_the_server(
    house: House, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "MAX_LOADER_RESTARTS", 2)
    fake("loader", "die")
    house.start()
    house.wait_until_started()
    time.sleep(0.3)
    house.let_die()
    house.join()
    assert house.failure is not None
    assert house.failure.message == "process loader was killed by SIGKILL"
    assert "loader 2 started" in house.lines
    assert "loader 3 started" not in house.lines


@pytest.mark.parametrize("role", ["prepare", "scheduler"])
def test_a_stop_does_not_wait_for_a_start(house: House, fake: Callable[[str, str], None], role: str) -> None:
    fake(role, "load")
    house.start()
    house.wait_for("front 0 started", f"{role} 0 started")
    house.supervisor.stop()
    assert house.join() < 3
    assert house.failure is None


def test_who_ignores_the_end_is_killed_after_a_grace_period(
    house: House, fake: Callable[[str, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor_module, "GRACE_S", 0.5)
    fake("front", "ignore")
    fake("worker0", "ignore")
    house.start()
    house.wait_until_started()
    time.sleep(0.3)
    house.supervisor.stop()
    assert 0.5 <= house.join() < 5
    assert house.failure is None


def test_the_second_signal_waits_for_nothing(house: House, fake: Callable[[str, str], None]) -> None:
    fake("front", "ignore")
    house.start()
    house.wait_until_started()
    house.supervisor.stop()
    time.sleep(0.2)
    house.supervisor.kill()
    assert house.join() < 2


def test_launch_without_http(house: House, fake: Callable[[str, str], None]) -> None:
    failures: list[ErrorInfo] = []
    fake("worker0", "die")
    server = launch(CONFIG, on_failure=failures.append, modules=MODULES)
    assert server.config.model.model_dir == "/prepared"
    assert Path(server.config.run_dir).is_dir()
    house.wait_for(*(f"{child} started" for child in ALL - {"front 0"}))
    house.let_die()
    deadline = time.monotonic() + 5
    while not failures:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert failures[0].message == "process worker0 was killed by SIGKILL"
    server.stop()
    server.stop()
    assert not Path(server.config.run_dir).exists()
    assert not Path(server.config.shm_dir).exists()


def test_launch_raises_what_makes_the_start_impossible(
    house: House, fake: Callable[[str, str], None]
) -> None:
    fake("prepare", "refuse")
    failures: list[ErrorInfo] = []
    with pytest.raises(ConfigError, match="prepare refuses"):
        launch(CONFIG, on_failure=failures.append, modules=MODULES)
    assert failures == []
    assert house.lines == ["prepare 0 started"]
