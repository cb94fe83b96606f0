"""Starts that fail, processes that die, signals: one honest line, honest answers, nothing left behind."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.helpers import TWO_DEVICES, Background, Stream, load_by_next_loader, wait_until
from tests.server import CUDA_FLAGS, Server, running_server
from tests.tiny_models import TinyModels, edit_json

SECONDS_OF_TOKENS = 450


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@contextmanager
def starting_server(tmp_path: Path, *args: Any) -> Iterator[Server]:
    """A server that nobody waits for; ended at the end however it is."""
    server = Server([str(arg) for arg in args], tmp_path / "server.log")
    try:
        yield server
    finally:
        server.stop()
        assert not server.leftovers()


def long_request() -> dict[str, Any]:
    return {
        "input_ids": [5, 6, 7],
        "sampling_params": {"temperature": 0, "max_new_tokens": SECONDS_OF_TOKENS, "ignore_eos": True},
    }


# ---- starts that fail -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--model-path", "/nowhere/model"], "/nowhere/model"),
        (["--model-path", "MODEL", "--tp-size", "3"], "--tp-size 3"),
        (["--model-path", "MODEL", "--tp-sise", "2"], "--tp-sise"),
        (["--model-path", "MODEL", "--lora-paths", "one=/nowhere/adapter"], "/nowhere/adapter"),
        (["--model-path", "MODEL", "--context-length", "many"], "--context-length"),
        ([], "--model-path"),
    ],
    ids=["no-model", "tp-does-not-divide", "no-such-flag", "no-adapter", "no-number", "no-model-path"],
)
def test_a_start_that_cannot_be_says_so_in_one_line(
    model_dir: Path, tmp_path: Path, args: list[str], words: str
) -> None:
    args = [str(model_dir) if arg == "MODEL" else arg for arg in args]
    with starting_server(tmp_path, *args, "--device", "cpu", "--log-level", "error") as server:
        assert server.wait_exit(60) not in (0, None)
        errors = [line for line in server.log().splitlines() if "manylora: error:" in line]
        assert len(errors) == 1, server.log()
        assert words in errors[0]
        assert "Traceback" not in server.log()


def test_a_model_that_needs_what_we_lack_is_refused_by_name(model_dir: Path, tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(model_dir, model)
    edit_json(model / "config.json", sliding_window=64)
    with starting_server(tmp_path, "--model-path", model, "--device", "cpu") as server:
        assert server.wait_exit(60) != 0
        assert "sliding_window=64" in server.log()


def test_a_port_that_is_taken_is_named_before_anything_is_loaded(model_dir: Path, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with starting_server(tmp_path, "--model-path", model_dir, "--port", port) as server:
            assert server.wait_exit(30) != 0
            assert str(port) in server.log()
            assert "cannot be bound" in server.log()


# ---- before it is ready -----------------------------------------------------------------------------------------------


def test_every_route_answers_503_until_the_server_is_ready(model_dir: Path, tmp_path: Path) -> None:
    with starting_server(tmp_path, "--model-path", model_dir, "--device", "cpu") as server:
        seen: dict[str, set[int]] = {"/v1/models": set(), "/generate": set(), "/health": set()}
        deadline = time.monotonic() + 60
        while 200 not in seen["/health"]:
            assert time.monotonic() < deadline, server.log_tail()
            try:
                seen["/v1/models"].add(server.get("/v1/models").status)
                seen["/generate"].add(server.post("/generate", {"text": "France"}).status)
                seen["/health"].add(server.get("/health").status)
            except ConnectionRefusedError:
                time.sleep(0.05)
        assert all(503 in statuses and statuses <= {503, 200} for statuses in seen.values()), seen


@pytest.mark.parametrize("delay_s", [0.3, 3.0], ids=["at-once", "while-it-loads"])
def test_sigterm_during_the_start_leaves_nothing(model_dir: Path, tmp_path: Path, delay_s: float) -> None:
    with starting_server(tmp_path, "--model-path", model_dir, "--device", "cpu", "--tp-size", 2) as server:
        time.sleep(delay_s)
        server.signal(signal.SIGTERM)
        server.wait_exit(15)


# ---- while it serves --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", TWO_DEVICES)
@pytest.mark.parametrize("role", ["worker1", "scheduler"])
def test_a_dead_process_is_an_honest_500_soon_and_a_clean_exit(
    model_dir: Path, tmp_path: Path, role: str, device: str
) -> None:
    flags = ("--device", device, "--tp-size", 2, *CUDA_FLAGS)
    with starting_server(tmp_path, "--model-path", model_dir, *flags) as server:
        server.wait_ready()
        stream = Stream(server, **long_request())
        stream.wait_for_token()
        whole = Background(lambda: server.post("/generate", long_request()))
        wait_until(lambda: server.ledger()["running"] == 2, "both requests to run")
        killed = time.monotonic()
        os.kill(server.children()[role], signal.SIGKILL)
        reply = whole.result(10)
        assert whole.ended - killed < 3
        assert (reply.status, reply.body["error"]["code"]) == (500, "worker_crashed")
        assert role in reply.body["error"]["message"]
        assert stream.result(10)["error"]["code"] == "worker_crashed"
        assert server.wait_exit(15) not in (0, None)
        assert f"process {role} was killed by SIGKILL" in server.log()


def test_a_dead_loader_is_started_again(model_dir: Path, tiny_models: TinyModels, tmp_path: Path) -> None:
    with running_server(model_dir, "--enable-lora", log_dir=tmp_path) as server:
        old = server.children()["loader"]
        os.kill(old, signal.SIGKILL)
        wait_until(lambda: server.children().get("loader", old) != old, "the next loader")
        load_by_next_loader(server, "one", tiny_models.adapter("llama", "r4_qv"))


def test_a_loader_killed_with_several_loads_under_way(
    model_dir: Path, tiny_models: TinyModels, tmp_path: Path
) -> None:
    """Every one of them is told; nothing of them stays; the next loader serves the same calls."""
    adapter = tiny_models.adapter("llama", "r4_qv")
    with running_server(model_dir, "--enable-lora", log_dir=tmp_path) as server:
        old = server.children()["loader"]
        os.kill(old, signal.SIGSTOP)
        calls = [Background(lambda name=f"a{i}": server.load(name, adapter)) for i in range(4)]
        time.sleep(0.5)
        assert all(call.running for call in calls)
        os.kill(old, signal.SIGKILL)
        for call in calls:
            reply = call.result(20)
            assert (reply.status, reply.body["loaded_adapters"]) == (500, {}), reply.body
            assert "process that reads adapters died" in reply.body["error_message"]
        wait_until(lambda: server.children().get("loader", old) != old, "the next loader")
        assert [server.load(f"a{i}", adapter).status for i in range(4)] == [200] * 4


def test_when_the_supervisor_is_killed_its_children_go_too(model_dir: Path, tmp_path: Path) -> None:
    server = Server(["--model-path", str(model_dir), "--device", "cpu"], tmp_path / "server.log")
    try:
        server.wait_ready()
        server.signal(signal.SIGKILL)
        server.wait_exit()
        wait_until(lambda: not server.children(), "the children to go", timeout_s=5)
    finally:
        server.stop()
        shutil.rmtree(server.run_dir_base)  # nobody was left to remove it; the next server of this user would


@pytest.mark.parametrize("device", TWO_DEVICES)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_under_load_ends_every_request_and_leaves_nothing(
    model_dir: Path, tmp_path: Path, number: signal.Signals, device: str
) -> None:
    flags = ("--device", device, "--tp-size", 2, *CUDA_FLAGS)
    with starting_server(tmp_path, "--model-path", model_dir, *flags) as server:
        server.wait_ready()
        stream = Stream(server, **long_request())
        stream.wait_for_token()
        whole = Background(lambda: server.post("/generate", long_request()))
        wait_until(lambda: server.ledger()["running"] == 2, "both requests to run")
        server.signal(number)
        assert server.wait_exit(15) == 0
        reply, last = whole.result(5), stream.result(5)
        assert (reply.status, reply.body["error"]["code"]) == (503, "shutting_down")
        assert last["error"]["code"] == "shutting_down"
