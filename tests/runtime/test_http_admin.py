"""The HTTP routes about adapters, models and the server; what holds for every route."""

from __future__ import annotations

import asyncio
import socket
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from manylora import __version__
from manylora.runtime.http.server import ROUTES
from manylora.runtime.messages import LoadAdapter, Submit, unpack_i32
from tests.runtime.http_front import served
from tests.tokenizer_manager.fake_scheduler import CONTEXT_LENGTH, VOCAB_SIZE, in_loop, until
from tests.tokenizer_manager.tiny_tokenizer import BOS_ID, save_byte_level


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@in_loop
async def test_a_burst_of_connections_waits_for_the_loop(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        with ExitStack() as opened:
            for _ in range(400):  # the loop takes none of them before the last is open
                opened.enter_context(socket.create_connection(("127.0.0.1", front.port), timeout=0.5))
            assert (await front.get("/health"))[0] == 200


@in_loop
async def test_load_and_unload_answer_as_in_the_seeds(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        load, unload = "/load_lora_adapter", "/unload_lora_adapter"
        assert await front.post(load, {"lora_name": "lora0", "lora_path": "a"}) == (
            200,
            {"success": True, "error_message": "", "loaded_adapters": {"lora0": "a"}},
        )
        status, answer = await front.post(load, {"lora_name": "lora1", "lora_path": "b", "pinned": True})
        assert (status, list(answer["loaded_adapters"])) == (200, ["lora0", "lora1"])
        status, answer = await front.post(load, {"lora_name": "lora0", "lora_path": "c"})
        assert (status, answer) == (
            400,
            {
                "success": False,
                "error_message": "lora0 is already loaded",
                "loaded_adapters": {"lora0": "a", "lora1": "b"},
                "code": "adapter_exists",
            },
        )
        status, answer = await front.post(load, {"lora_name": "lora0", "lora_path": "c", "replace": True})
        assert (status, list(answer["loaded_adapters"].items())) == (200, [("lora1", "b"), ("lora0", "c")])
        status, answer = await front.post(unload, {"lora_name": "lora1"})
        assert (status, answer) == (
            200,
            {"success": True, "error_message": "", "loaded_adapters": {"lora0": "c"}},
        )
        status, answer = await front.post(unload, {"lora_name": "lora1"})
        assert (status, answer["success"], answer["loaded_adapters"]) == (400, False, {"lora0": "c"})
        loads = [m for m in front.scheduler.received if isinstance(m, LoadAdapter)]
        assert [(m.pinned, m.replace) for m in loads] == [
            (False, False),
            (True, False),
            (False, False),
            (False, True),
        ]


@pytest.mark.parametrize(
    ("path", "body", "message"),
    [
        ("/load_lora_adapter", {"lora_name": "x"}, "missing required field `lora_path`"),
        ("/load_lora_adapter", {"lora_name": 1, "lora_path": "a"}, "Expected `str`, got `int`"),
        ("/load_lora_adapter", {"lora_name": "x", "lora_path": "a", "rank": 4}, "unknown field `rank`"),
        ("/load_lora_adapter", b"nonsense", "JSON is malformed"),
        ("/unload_lora_adapter", {}, "missing required field `lora_name`"),
    ],
)
@in_loop
async def test_adapter_body_that_is_not_understood(
    tokenizer_dir: Path, path: str, body: Any, message: str
) -> None:
    async with served(tokenizer_dir) as front:
        status, answer = await front.post(path, body)
        assert status == 400
        assert set(answer) == {"success", "error_message", "loaded_adapters", "code"}
        assert answer["code"] == "invalid_request"
        assert (answer["success"], answer["loaded_adapters"]) == (False, None)
        assert message in answer["error_message"]
        assert not front.scheduler.received


@in_loop
async def test_a_load_goes_on_when_the_client_leaves(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        body = {"lora_name": "x", "lora_path": "a"}
        asking = asyncio.create_task(front.post("/load_lora_adapter", body))
        await until(lambda: front.scheduler.received)
        asking.cancel()
        assert "x" in [card["id"] for card in (await front.get("/v1/models"))[1]["data"]]


@in_loop
async def test_models(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        for name in ("lora1", "lora0"):
            await front.post("/load_lora_adapter", {"lora_name": name, "lora_path": f"path/{name}"})
        status, answer = await front.get("/v1/models")
        assert (status, answer["object"]) == (200, "list")
        base, *adapters = answer["data"]
        created = base.pop("created")
        assert base == {
            "id": "base",
            "object": "model",
            "owned_by": "manylora",
            "root": "org/base",
            "parent": None,
            "max_model_len": CONTEXT_LENGTH,
        }
        assert [(card["id"], card["root"], card["parent"]) for card in adapters] == [
            ("lora1", "path/lora1", "base"),
            ("lora0", "path/lora0", "base"),
        ]
        assert {card["created"] for card in adapters} == {created}


@in_loop
async def test_health(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        assert await front.get("/health") == (200, "")
        assert not front.scheduler.received
        assert await front.get("/health_generate") == (200, "")
        [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        [request] = submit.requests
        assert list(unpack_i32(request.input_ids)) == [BOS_ID]
        assert request.params.max_new_tokens == 1


@in_loop
async def test_health_generate_without_a_token(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.runtime.http.generate_routes.HEALTH_TIMEOUT_S", 0.05)
    async with served(tokenizer_dir) as front:
        front.scheduler.held = True
        status, answer = await front.get("/health_generate")
        assert status == 503
        assert "No token came back" in answer["error"]["message"]
        await until(lambda: front.scheduler.aborted == [1])


@in_loop
async def test_health_generate_behind_others(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manylora.runtime.http.generate_routes.HEALTH_TIMEOUT_S", 0.2)
    async with served(tokenizer_dir) as front:
        front.scheduler.held = True
        asking = asyncio.create_task(front.get("/health_generate"))
        await until(lambda: front.scheduler.running)
        front.scheduler.steps += 1  # for others
        assert await asking == (200, "")
        await until(lambda: front.scheduler.aborted == [1])


@in_loop
async def test_model_and_server_info(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        assert await front.get("/get_model_info") == (
            200,
            {
                "model_path": "org/base",
                "tokenizer_path": "org/base",
                "is_generation": True,
                "preferred_sampling_params": None,
                "weight_version": "default",
            },
        )
        status, info = await front.get("/get_server_info")
        assert status == 200
        assert info["version"] == __version__
        assert (info["model_path"], info["tp_size"], info["max_loras_per_batch"]) == ("org/base", 1, 8)
        assert (info["context_length"], info["max_total_tokens"]) == (CONTEXT_LENGTH, 4096)
        [ledger] = info["internal_states"]
        assert ledger["pages_free"] + ledger["pages_cached"] + ledger["pages_held"] == ledger["pages_total"]


@pytest.mark.parametrize("method", ["GET", "POST"])
@in_loop
async def test_flush_cache(tokenizer_dir: Path, method: str) -> None:
    async with served(tokenizer_dir) as front:
        async with front.client.request(method, "/flush_cache") as response:
            assert response.status == 200
            assert (await response.text()).startswith("Cache flushed.\n")
        front.scheduler.held = True
        asking = asyncio.create_task(front.post("/generate", {"text": "x"}))
        await until(lambda: front.scheduler.running)
        async with front.client.request(method, "/flush_cache") as response:
            assert response.status == 400
            assert (await response.json())["error"]["code"] == "busy"
        front.scheduler.held = False
        await asking


# ---- every route ----------------------------------------------------------------------------------------------------


@in_loop
async def test_every_route_answers_503_until_ready(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir, started=False) as front:
        for route in ROUTES:
            body = b"{}" if route.method != "GET" else None
            async with front.client.request(route.method, route.path, data=body) as response:
                assert response.status == 503, route.path
                assert (await response.json())["error"]["code"] == "not_ready"
                assert response.headers["Retry-After"] == "1"
        assert not front.scheduler.received


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/generate", 405, "method_not_allowed"),
        ("PUT", "/load_lora_adapter", 405, "method_not_allowed"),
        ("DELETE", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/no/such/route", 404, "not_found"),
    ],
)
@in_loop
async def test_wrong_method_or_route(
    tokenizer_dir: Path, method: str, path: str, status: int, code: str
) -> None:
    async with served(tokenizer_dir) as front, front.client.request(method, path) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert (error["code"], error["type"]) == (code, "invalid_request_error")
        assert f"{method} {path}" in error["message"]
        assert ("Allow" in response.headers) == (status == 405)


@in_loop
async def test_a_fault_of_ours_says_nothing_of_the_inside(
    tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with served(tokenizer_dir) as front:

        async def broken(*_: Any, **__: Any) -> Any:
            raise KeyError("secret")

        front.state.manager.generate = broken  # type: ignore[method-assign]
        status, code, _, message = await front.error("/generate", {"text": "x"})
        assert (status, code) == (500, "internal_error")
        assert "secret" not in message
        assert "secret" in caplog.text
