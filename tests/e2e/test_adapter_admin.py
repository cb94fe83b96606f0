"""The admin API on a real server: races for a version, unloads that do not wait, time limits, pins, and the shell command.

The signature model makes the weights behind every token visible.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from manylora import Engine
from manylora.runtime.errors import AdapterUnloadedError, BadRequestError, VersionConflictError
from tests.e2e.helpers import Background, Stream, wait_until
from tests.server import Reply, Server, environment_of_a_program, running_server
from tests.signature import build_signature_adapter, build_signature_model, signature_prompt
from tests.tiny_models import edit_json

PROMPT = signature_prompt(20, seed=0)
LONG = 800  # tokens: seconds, so that things happen meanwhile
TOKENS = (50, 51, 52)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("signature") / "model"
    build_signature_model(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[int, str]:
    """The directory of an adapter for each of TOKENS, which it always says."""
    root = tmp_path_factory.mktemp("adapters")
    for token in TOKENS:
        build_signature_adapter(root / str(token), "down", token, rank=8)
    return {token: str(root / str(token)) for token in TOKENS}


@pytest.fixture(scope="module")
def shared_server(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    flags = ("--enable-lora", "--max-loras-per-batch", 3)
    with running_server(model_dir, *flags, log_dir=tmp_path_factory.mktemp("logs")) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """Without adapters before each test; afterwards the ledger balances and nothing is held."""
    yield shared_server
    for card in cards(shared_server):
        assert delete(shared_server, card["name"], force=True).status == 200
    assert shared_server.post("/flush_cache", {}).status == 200
    ledger = shared_server.wait_idle()
    assert ledger["pages_free"] == ledger["pages_total"]
    assert ledger["host_pages_free"] == ledger["host_pages_total"]
    assert (ledger["leases"], ledger["live_versions"], ledger["pages_held"]) == (0, 0, 0)


def cards(server: Server) -> list[dict[str, Any]]:
    reply = server.get("/v1/adapters")
    assert (reply.status, reply.body["object"]) == (200, "list")
    return reply.body["data"]


def put(server: Server, name: str, path: str, **settings: Any) -> Reply:
    return server.request("PUT", f"/v1/adapters/{name}", {"path": path, **settings})


def patch(server: Server, name: str, **settings: Any) -> Reply:
    return server.request("PATCH", f"/v1/adapters/{name}", settings)


def delete(server: Server, name: str, **settings: Any) -> Reply:
    return server.request("DELETE", f"/v1/adapters/{name}", settings)


def body(num_tokens: int, name: str) -> dict[str, Any]:
    params = {"temperature": 0, "max_new_tokens": num_tokens}
    return {"input_ids": PROMPT, "lora_path": name, "sampling_params": params}


def code(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.body["error"]["code"]


def test_of_many_that_replace_one_version_exactly_one_wins(server: Server, adapters: dict[int, str]) -> None:
    """And what they then see is the winner's weights. Eight writers, several rounds."""
    with ThreadPoolExecutor(8) as pool:
        version = 0
        for _ in range(5):
            replies = list(
                pool.map(
                    lambda i, version=version: (
                        TOKENS[i % 3],
                        put(server, "one", adapters[TOKENS[i % 3]], if_version=version),
                    ),
                    range(8),
                )
            )
            won = [(token, reply) for token, reply in replies if reply.status < 400]
            assert len(won) == 1, [reply.status for _, reply in replies]
            [(token, reply)] = won
            assert reply.status == (200 if version else 201)
            lost = {code(other) for _, other in replies if other is not reply}
            assert lost <= {(409, "version_conflict"), (409, "adapter_exists")}
            answer = server.generate(**body(3, "one"))
            assert answer["output_ids"] == [token] * 3
            assert answer["meta_info"]["lora_version"] == reply.body["version"] > version
            version = reply.body["version"]
    stale = put(server, "one", adapters[50], if_version=version - 1)
    assert code(stale) == (409, "version_conflict")
    assert f"version {version}" in stale.body["error"]["message"]


def test_a_replacement_keeps_the_counts_and_what_runs(server: Server, adapters: dict[int, str]) -> None:
    first = put(server, "one", adapters[50]).body
    stream = Stream(server, **body(LONG, "one"))
    stream.wait_for_token()
    second = put(server, "one", adapters[51]).body
    assert (second["running"], second["requests"], second["digest"]) == (
        1,
        1,
        server.get("/v1/adapters/one").body["digest"],
    )
    assert (second["digest"] != first["digest"], second["version"] > first["version"]) == (True, True)
    assert server.generate(**body(4, "one"))["output_ids"] == [51] * 4
    assert stream.running
    assert stream.result()["output_ids"] == [50] * LONG
    [card] = cards(server)
    assert (card["requests"], card["tokens"], card["loads"], card["running"]) == (2, LONG + 4, 2, 0)
    assert (card["tier"], card["rank"], card["modules"]) == ("resident", 8, ["down_proj"])
    assert card["queue_s"] > 0
    assert first["loaded_at"] < card["loaded_at"] <= card["last_use"] <= time.time()
    assert 0 < card["bytes"] <= card["pages"] * server.get("/get_server_info").body["page_bytes"]


def test_force_ends_requests_with_an_error_and_never_as_success(
    server: Server, adapters: dict[int, str]
) -> None:
    put(server, "one", adapters[50])
    stream = Stream(server, **body(2000, "one"))
    whole = Background(lambda: server.post("/generate", body(2000, "one")))
    stream.wait_for_token()
    wait_until(lambda: cards(server)[0]["running"] == 2, "both requests")
    reply = delete(server, "one", force=True)
    assert (reply.status, reply.body["running"], reply.body["tier"]) == (200, 0, "disk")
    assert code(whole.result()) == (410, "adapter_unloaded")
    assert stream.result()["error"]["code"] == "adapter_unloaded"
    assert server.ledger()["live_versions"] == 0
    assert code(server.get("/v1/adapters/one")) == (404, "adapter_not_found")
    assert code(server.post("/generate", body(1, "one"))) == (400, "adapter_not_found")


def test_a_drain_lets_short_requests_end_and_ends_long_ones(server: Server, adapters: dict[int, str]) -> None:
    """And may be asked for while an unload waits that has no limit."""
    put(server, "one", adapters[50])
    long = Stream(server, **body(2000, "one"))
    long.wait_for_token()
    short = Background(lambda: server.generate(**body(8, "one")))
    wait_until(lambda: cards(server)[0]["requests"] == 2, "the short request")
    patient = Background(lambda: delete(server, "one"))
    wait_until(lambda: not cards(server), "the name to go")
    assert code(delete(server, "one")) == (409, "adapter_busy")
    assert code(delete(server, "one", drain_s=0, if_version=999)) == (409, "version_conflict")
    started = time.monotonic()
    assert server.request("DELETE", "/v1/adapters/one?drain_s=0.5").status == 200
    assert time.monotonic() - started >= 0.5
    assert short.result()["output_ids"] == [50] * 8
    assert patient.result().status == 200
    assert long.result()["error"]["code"] == "adapter_unloaded"
    assert 8 < len(long.events[-2]["output_ids"]) < 2000


def test_an_adapter_nobody_uses_goes_by_itself(server: Server, adapters: dict[int, str]) -> None:
    put(server, "brief", adapters[50], pinned=True)
    put(server, "kept", adapters[51])
    stream = Stream(server, **body(LONG, "brief"))
    stream.wait_for_token()
    assert patch(server, "brief", ttl_s=0.2).body["ttl_s"] == 0.2
    assert stream.result()["output_ids"] == [50] * LONG, "it went while it was used"
    wait_until(lambda: [card["name"] for card in cards(server)] == ["kept"], "the end")
    assert "LoRA adapter brief was not used for its ttl_s of 0.2 s" in server.log()
    assert server.generate(**body(2, "kept"))["output_ids"] == [51] * 2


def test_pins_are_set_and_limited(server: Server, adapters: dict[int, str]) -> None:
    for token in TOKENS:
        put(server, f"a{token}", adapters[token])
    for name in ("a50", "a51"):
        assert patch(server, name, pinned=True).body["pinned"]
    wait_until(lambda: [card["tier"] for card in cards(server)[:2]] == ["resident"] * 2, "the pins")
    refused = patch(server, "a52", pinned=True)
    assert code(refused) == (409, "adapter_limit")
    assert "starvation" in refused.body["error"]["message"]
    assert code(put(server, "new", adapters[52], pinned=True)) == (409, "adapter_limit")
    assert patch(server, "a50", pinned=False, ttl_s=100, if_version=cards(server)[0]["version"]).status == 200
    assert patch(server, "a52", pinned=True).status == 200
    assert server.generate(**body(2, "a50"))["output_ids"] == [50] * 2


def test_what_cannot_be_loaded_is_422_and_changes_nothing(
    server: Server, adapters: dict[int, str], tmp_path: Path
) -> None:
    put(server, "one", adapters[50])
    build_signature_adapter(tmp_path / "dora", "down", 70)
    edit_json(tmp_path / "dora" / "adapter_config.json", use_dora=True)
    for path in (str(tmp_path / "dora"), str(tmp_path / "nowhere"), "\0"):
        reply = put(server, "one", path)
        assert code(reply) == (422, "adapter_rejected")
        assert reply.body["error"]["param"] == ("use_dora" if "dora" in path else "path")
    assert code(put(server, "%20x", adapters[50])) == (400, "invalid_request")
    assert server.generate(**body(2, "one"))["output_ids"] == [50] * 2


def test_the_command_does_it_from_a_shell(server: Server, adapters: dict[int, str]) -> None:
    def command(*args: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "manylora", "adapters", *args, "--url", server.url],
            env=environment_of_a_program(),
            capture_output=True,
            text=True,
            timeout=60,
        )

    loaded = command("load", "org/a b", adapters[50], "--if-version", "0", "--json")
    assert (loaded.returncode, loaded.stderr) == (0, "")
    assert json.loads(loaded.stdout) == {**cards(server)[0], "tier": "host"}
    assert server.generate(**body(2, "org/a b"))["output_ids"] == [50] * 2
    listed = command("list")
    assert listed.stdout.splitlines()[1].startswith("org/a b")
    again = command("load", "org/a b", adapters[51], "--if-version", "0")
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr.endswith("(version_conflict)\n")
    assert command("pin", "org/a b").returncode == 0
    assert cards(server)[0]["pinned"]
    assert command("unload", "org/a b", "--drain", "1").returncode == 0
    assert cards(server) == []


def test_engine_does_the_same(model_dir: Path, adapters: dict[int, str]) -> None:
    params = {"temperature": 0, "max_new_tokens": 3}
    with Engine(str(model_dir), device="cpu", enable_lora=True) as engine:
        assert engine.list_lora_adapters() == []
        engine.load_lora_adapter("one", adapters[50], if_version=0, ttl_s=1000)
        refusals: list[Callable[[], Any]] = [
            lambda: engine.load_lora_adapter("one", adapters[51], replace=True, if_version=0),
            lambda: engine.unload_lora_adapter("one", if_version=2),
        ]
        for refused in refusals:
            with pytest.raises(VersionConflictError, match="version 1"):
                refused()
        [card] = engine.list_lora_adapters()
        assert (card["name"], card["version"], card["ttl_s"], card["pinned"]) == ("one", 1, 1000.0, False)
        assert engine.pin_lora_adapter("one")["pinned"]
        assert not engine.update_lora_adapter("one", pinned=False, ttl_s=None)["pinned"]
        assert engine.list_lora_adapters()[0]["ttl_s"] is None
        wrong_settings: list[dict[str, Any]] = [{"ttl_s": -1}, {"if_version": "x"}]
        for wrong in wrong_settings:
            with pytest.raises(BadRequestError):
                engine.update_lora_adapter("one", pinned=True, **wrong)
        assert (
            engine.generate(input_ids=PROMPT, sampling_params=params, lora_path="one")["output_ids"]
            == [50] * 3
        )
        stream = engine.generate(
            input_ids=PROMPT, sampling_params={**params, "max_new_tokens": LONG}, lora_path="one", stream=True
        )
        next(stream)
        assert engine.unload_lora_adapter("one", force=True) == {}
        with pytest.raises(AdapterUnloadedError, match="one"):
            list(stream)
