"""Requests and adapters that come and go on a healthy server: aborts, unloads, replaces, refusals, a full queue.

The signature model makes the weights behind every token visible.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.helpers import ONE_DEVICE, Background, Stream, wait_until
from tests.server import Server, running_server
from tests.signature import BASE_TOKEN, build_signature_adapter, build_signature_model, signature_prompt
from tests.tiny_models import edit_json

PROMPT = signature_prompt(20, seed=0)
CONTEXT = 2048
LONG = 800  # tokens: seconds, so that things happen meanwhile


class Adapters:
    """Signature adapters below a directory, made when asked for."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def path(self, token: int, rank: int = 8, way: str = "down") -> Path:
        directory = self._root / f"{way}-{rank}-{token}"
        if not directory.exists():
            build_signature_adapter(directory, way, token, rank=rank)
        return directory


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    return Adapters(tmp_path_factory.mktemp("adapters"))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("signature") / "model"
    build_signature_model(directory)
    return directory


@pytest.fixture(scope="module", params=ONE_DEVICE)
def shared_server(
    request: pytest.FixtureRequest, model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    with running_server(
        model_dir,
        *("--enable-lora", "--max-loras-per-batch", 3, "--max-lora-rank", 64, "--max-total-tokens", 8192),
        *("--max-queued-requests", 40, "--max-running-requests", 8),
        device=request.param,
        log_dir=tmp_path_factory.mktemp("logs"),
    ) as server:
        yield server


@pytest.fixture
def server(shared_server: Server) -> Iterator[Server]:
    """Without adapters before each test; afterwards the ledger balances and nothing is held."""
    yield shared_server
    ledger = shared_server.wait_idle()
    for adapter in ledger["adapters"]:
        shared_server.unload(adapter["lora_name"])
    assert shared_server.post("/flush_cache", {}).status == 200
    ledger = shared_server.ledger()
    assert ledger["pages_free"] == ledger["pages_total"]
    assert ledger["host_pages_free"] == ledger["host_pages_total"]
    assert (ledger["leases"], ledger["live_versions"], ledger["pages_held"]) == (0, 0, 0)


def body(num_tokens: int, lora_path: str | None = None) -> dict[str, Any]:
    return {
        "input_ids": PROMPT,
        "lora_path": lora_path,
        "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens},
    }


def test_a_client_that_leaves_a_stream_frees_everything(server: Server) -> None:
    stream = Stream(server, **body(LONG))
    stream.wait_for_token()
    assert server.ledger()["running"] == 1
    stream.hang_up()
    wait_until(lambda: server.ledger()["running"] == 0, "the abort", timeout_s=3)


def test_a_client_that_leaves_before_its_answer_frees_everything(server: Server) -> None:
    with pytest.raises(TimeoutError):
        server.post("/generate", body(LONG), timeout_s=0.1)
    wait_until(lambda: server.ledger()["running"] == 0, "the abort", timeout_s=3)


def test_abort_request_ends_by_prefix_and_answers_with_what_there_is(server: Server) -> None:
    kept = Stream(server, **body(300), rid="keep-1")
    stopped = [Stream(server, **body(LONG), rid=f"stop-{i}") for i in range(2)]
    for stream in (kept, *stopped):
        stream.wait_for_token()
    assert server.post("/abort_request", {"rid": "stop-"}).status == 200
    for stream in stopped:
        answer = stream.result(5)
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        assert set(answer["output_ids"]) == {BASE_TOKEN}
        assert len(answer["output_ids"]) < LONG
    answer = kept.result()
    assert answer["output_ids"] == [BASE_TOKEN] * 300
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 300}


def test_unload_waits_for_running_requests_and_the_name_is_gone_at_once(
    server: Server, adapters: Adapters
) -> None:
    assert server.load("one", adapters.path(50)).status == 200
    stream = Stream(server, **body(LONG, "one"))
    stream.wait_for_token()
    unload = Background(lambda: server.unload("one"))
    wait_until(lambda: not server.ledger()["adapters"], "the name to go", timeout_s=3)
    refused = server.post("/generate", body(1, "one"))
    assert refused.status == 400
    assert refused.body["error"]["code"] == "adapter_not_found"
    assert unload.running
    assert stream.running
    assert stream.result()["output_ids"] == [50] * LONG
    reply = unload.result(5)
    assert (reply.status, reply.body["success"], reply.body["loaded_adapters"]) == (200, True, {})


def test_replace_is_atomic_and_running_requests_keep_the_old_version(
    server: Server, adapters: Adapters
) -> None:
    server.load("one", adapters.path(50))
    stream = Stream(server, **body(LONG, "one"))
    stream.wait_for_token()
    refused = server.load("one", adapters.path(51, rank=40))
    assert (refused.status, refused.body["success"]) == (400, False)
    reply = server.load("one", adapters.path(51, rank=40), replace=True)
    assert (reply.status, reply.body["error_message"]) == (200, "")
    assert stream.running
    answer = server.generate(**body(5, "one"))
    assert answer["output_ids"] == [51] * 5
    assert answer["meta_info"]["cached_tokens"] == 0
    old = stream.result()
    assert old["output_ids"] == [50] * LONG
    assert old["meta_info"]["lora_version"] != answer["meta_info"]["lora_version"]


def test_more_adapters_than_a_step_takes_all_get_their_turn(server: Server, adapters: Adapters) -> None:
    """Eight adapters through three places, each waiting behind long requests of the others."""
    tokens = range(60, 68)
    for token in tokens:
        assert server.load(f"a{token}", adapters.path(token, rank=24, way="up")).status == 200
    answers = server.generate(
        input_ids=[PROMPT] * 16,
        lora_path=[f"a{token}" for token in tokens] * 2,
        sampling_params={"temperature": 0, "max_new_tokens": 40},
    )
    assert [answer["output_ids"] for answer in answers] == [[token] * 40 for token in tokens] * 2


def test_loads_that_must_fail_say_why_and_change_nothing(
    server: Server, adapters: Adapters, tmp_path: Path
) -> None:
    server.load("one", adapters.path(50))
    before = server.ledger()
    build_signature_adapter(tmp_path / "dora", "down", 70)
    edit_json(tmp_path / "dora" / "adapter_config.json", use_dora=True)
    build_signature_adapter(tmp_path / "torn", "down", 70)
    weights = tmp_path / "torn" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    (tmp_path / "empty").mkdir()
    for name, path, words in [
        ("one", adapters.path(51), "one"),
        ("two", tmp_path / "nowhere", "nowhere"),
        ("two", tmp_path / "empty", "adapter_config.json"),
        ("two", tmp_path / "torn", "safetensors"),
        ("two", tmp_path / "dora", "use_dora"),
        ("two", adapters.path(71, rank=80), "--max-lora-rank"),
    ]:
        reply = server.load(name, path)
        assert (reply.status, reply.body["success"]) == (400, False), path
        assert words in reply.body["error_message"], reply.body
        assert reply.body["loaded_adapters"] == {"one": str(adapters.path(50))}
    unknown = server.unload("two")
    assert (unknown.status, unknown.body["success"]) == (400, False)
    assert "two" in unknown.body["error_message"]
    assert server.ledger()["adapters"] == before["adapters"]
    assert server.generate(**body(3, "one"))["output_ids"] == [50] * 3


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"lora_path": "nobody"}, "adapter_not_found", None),
        ({"input_ids": []}, "invalid_request", "input_ids"),
        ({"input_ids": [99999]}, "invalid_request", "input_ids"),
        ({"input_ids": None}, "invalid_request", None),
        ({"sampling_params": {"temperature": -1}}, "invalid_request", "sampling_params.temperature"),
        ({"sampling_params": {"temprature": 1}}, "invalid_request", "sampling_params.temprature"),
        ({"sampling_params": {"max_new_tokens": CONTEXT - 19}}, "context_length_exceeded", None),
        ({"input_ids": [5] * (CONTEXT + 1)}, "context_length_exceeded", None),
        ({"lora_path": ["one", "two"]}, "invalid_request", "lora_path"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_input_is_refused_with_what_and_where(
    server: Server, change: dict[str, Any], code: str, param: str | None
) -> None:
    reply = server.post("/generate", {**body(4), **change})
    assert reply.status == 400
    assert reply.body["error"]["code"] == code, reply.body
    if param is not None:
        assert reply.body["error"]["param"] == param, reply.body


def test_the_context_is_usable_to_its_last_token(server: Server) -> None:
    answer = server.generate(**body(CONTEXT - len(PROMPT)))
    assert answer["output_ids"] == [BASE_TOKEN] * (CONTEXT - len(PROMPT))


def test_a_body_that_is_no_json_is_a_400(server: Server) -> None:
    reply = server.post("/generate", b'{"text": ')
    assert (reply.status, reply.body["error"]["code"]) == (400, "invalid_request")


def test_a_list_is_admitted_whole_or_refused_whole(server: Server) -> None:
    """The queue holds 40: of a call with 60 nothing is done, and one with 30 still fits."""
    too_many = {**body(2), "input_ids": [PROMPT] * 60}
    reply = server.post("/generate", too_many)
    assert (reply.status, reply.body["error"]["code"]) == (503, "queue_full")
    answers = server.generate(**{**body(2), "input_ids": [PROMPT] * 30})
    assert len(answers) == 30


def test_flush_cache_is_refused_while_something_runs(server: Server) -> None:
    stream = Stream(server, **body(LONG))
    stream.wait_for_token()
    reply = server.get("/flush_cache")
    assert reply.status == 400
    stream.hang_up()
    server.wait_idle()
    assert server.get("/flush_cache").status == 200


def test_models_lists_the_base_and_a_card_per_adapter(server: Server, adapters: Adapters) -> None:
    server.load("one", adapters.path(50))
    base, card = server.get("/v1/models").body["data"]
    assert (base["parent"], base["max_model_len"]) == (None, CONTEXT)
    assert (card["id"], card["root"], card["parent"]) == ("one", str(adapters.path(50)), base["id"])


def test_a_disabled_radix_cache_finds_nothing(model_dir: Path, tmp_path: Path) -> None:
    with running_server(model_dir, "--disable-radix-cache", log_dir=tmp_path) as server:
        for _ in range(2):
            answer = server.generate(**body(3))
            assert answer["output_ids"] == [BASE_TOKEN] * 3
            assert answer["meta_info"]["cached_tokens"] == 0
        reply = server.post("/generate", body(1, "one"))
        assert (reply.status, reply.body["error"]["code"]) == (400, "lora_disabled")
