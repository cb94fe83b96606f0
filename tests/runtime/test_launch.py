"""The command line as a user meets it when something is wrong: one line, a non-zero exit, nothing left."""

import json
import os
import queue
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from manylora.runtime.config import HttpArgs, ModelArgs, ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo
from manylora.runtime.launch import bind, launch, serve
from tests.runtime.fakes import REPOSITORY
from tests.runtime.test_prepare import LLAMA


def run(module: str, *args: str, runtime_dir: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / ".pkg"), "XDG_RUNTIME_DIR": str(runtime_dir)}
    return subprocess.run(
        [sys.executable, "-m", module, *args],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--model-path", "m", "--tp-size", "0"], "--tp-size must be at least 1, got 0"),
        (["--port", "1"], "--model-path is required"),
    ],
)
def test_a_bad_command_line(short_dir: Path, args: list[str], message: str) -> None:
    result = run("manylora.launch_server", *args, runtime_dir=short_dir)
    assert (result.returncode, result.stderr) == (2, f"manylora: error: {message}\n")


def test_no_command_shows_the_usage(short_dir: Path) -> None:
    result = run("manylora", runtime_dir=short_dir)
    assert result.returncode == 2
    assert result.stderr.startswith("usage: manylora serve")
    assert run("manylora", "--version", runtime_dir=short_dir).stdout.startswith("manylora ")


def test_a_taken_port_is_said_before_anything_starts(short_dir: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = run("manylora", "serve", "--model-path", "m", f"--port={port}", runtime_dir=short_dir)
    message = f"--port {port} on 127.0.0.1 cannot be bound: Address already in use"
    assert (result.returncode, result.stderr) == (1, f"manylora: error: {message}\n")


def test_a_missing_model(short_dir: Path) -> None:
    result = run("manylora", "serve", "--model-path", "/no/model", "--port=0", runtime_dir=short_dir)
    message = "--model-path /no/model is not a directory"
    assert (result.returncode, result.stderr) == (1, f"manylora: error: {message}\n")
    assert not list(short_dir.iterdir())


def test_a_missing_gpu(short_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    flags = ["--model-path", str(tmp_path), "--port=0", "--device=cuda"]
    result = run("manylora", "serve", *flags, runtime_dir=short_dir)
    assert result.returncode == 1
    assert result.stderr.startswith("manylora: error: --device cuda: CUDA is missing")
    assert result.stderr.count("\n") == 1


def test_a_host_that_is_not_ours() -> None:
    with pytest.raises(ConfigError, match="cannot be bound: Cannot assign requested address"):
        bind("192.0.2.1", 0)
    with pytest.raises(ConfigError, match="--host no host cannot be resolved"):
        bind("no host", 0)


def test_a_localhost_that_is_none(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Somebody's name resolution says so: then it is not open to all for the sake of its name."""
    monkeypatch.setattr("manylora.runtime.launch.bind", lambda _host, port: bind("0.0.0.0", port))
    monkeypatch.setattr("manylora.runtime.launch.setup_logging", lambda *_, **__: None)
    http = HttpArgs(host="localhost", port=0)
    assert serve(ServerConfig(model=ModelArgs(model_path="m"), http=http)) == 1
    assert capsys.readouterr().err == "manylora: error: --host localhost is no loopback address here\n"


def test_a_bug_of_the_supervisor_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def __init__(
            self, config: ServerConfig, on_prepared: Callable[[ServerConfig], None], **_: object
        ) -> None:
            self._tell = lambda: on_prepared(config)

        def run(self) -> None:
            self._tell()
            raise RuntimeError("a bug")

    monkeypatch.setattr("manylora.runtime.launch.Supervisor", Broken)
    failures: queue.Queue[ErrorInfo] = queue.Queue()
    launch(ServerConfig(model=ModelArgs(model_path="m")), on_failure=failures.put)
    assert failures.get(timeout=10).message == "the supervisor failed: RuntimeError: a bug"
