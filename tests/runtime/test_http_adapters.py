"""The routes below /v1/adapters: what they take, what they ask of the scheduler, and the statuses they answer with."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manylora.runtime.errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterExistsError,
    AdapterLimitError,
    AdapterRejectedError,
    BadRequestError,
    LoRADisabledError,
    ManyloraError,
    ShuttingDownError,
    VersionConflictError,
)
from manylora.runtime.messages import LoadAdapter, UnloadAdapter, UpdateAdapter
from tests.runtime.http_front import HttpFront, served
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, in_loop, until
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

FIELDS = (
    "name version path revision digest rank modules bytes pages tier pinned ttl_s running waiting requests hits loads "
    "evictions tokens queue_s loaded_at last_use"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


async def ask(front: HttpFront, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and answer of a request whose target goes out as it is written here: a client would tidy it up."""
    data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
    try:
        writer.write(head.encode() + data)
        answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    top, _, text = answer.partition(b"\r\n\r\n")
    return int(top.split()[1]), json.loads(text)


def error_of(answer: Any) -> tuple[str, str | None]:
    return answer["error"]["code"], answer["error"]["param"]


@in_loop
async def test_an_adapters_whole_life(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        assert await ask(front, "GET", "/v1/adapters") == (200, {"object": "list", "data": []})
        body = {"path": "p", "pinned": True, "ttl_s": 60, "if_version": 0}
        status, card = await ask(front, "PUT", "/v1/adapters/a", body)
        assert (status, card["name"], card["version"], card["path"]) == (201, "a", 1, "p")
        assert list(card) == FIELDS.split()
        assert (card["revision"], card["last_use"]) == (None, None)
        assert await ask(front, "GET", "/v1/adapters/a") == (200, card)
        status, card = await ask(front, "PUT", "/v1/adapters/a", {"path": "q"})
        assert (status, card["version"]) == (200, 2)
        assert (await ask(front, "GET", "/v1/adapters"))[1]["data"] == [card]
        changes = {"pinned": False, "ttl_s": None, "if_version": 2}
        assert await ask(front, "PATCH", "/v1/adapters/a", changes) == (200, card)
        assert await ask(front, "DELETE", "/v1/adapters/a") == (200, card)
        for method in ("GET", "DELETE"):
            status, answer = await ask(front, method, "/v1/adapters/a")
            assert (status, error_of(answer)) == (404, ("adapter_not_found", "name"))
        adapter_calls = [
            message
            for message in front.scheduler.received
            if isinstance(message, LoadAdapter | UpdateAdapter | UnloadAdapter)
        ]
        assert [msgspec.structs.replace(message, call=0) for message in adapter_calls] == [
            LoadAdapter(0, "a", "p", True, True, 0, 60.0),
            LoadAdapter(0, "a", "q", False, True, None, None),
            UpdateAdapter(0, "a", False, None, 2),
            UnloadAdapter(0, "a", None, None),
            UnloadAdapter(0, "a", None, None),
        ]


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("org%2Fadapter%3Av1", "org/adapter:v1"),
        ("org/adapter", "org/adapter"),
        ("a//b/", "a//b/"),
        ("..", ".."),
        ("%2E", "."),
        ("../models", "../models"),
        ("a%252Fb", "a%2Fb"),
        ("100%25", "100%"),
        ("a%20b+c", "a b+c"),
        ("%C3%BC%F0%9F%90%88", "ü🐈"),
        ("a%3Fb%23c%7B%7D%22", 'a?b#c{}"'),
    ],
)
@in_loop
async def test_every_name_can_be_reached(tokenizer_dir: Path, raw: str, name: str) -> None:
    async with served(tokenizer_dir) as front:
        body = {"lora_name": name, "lora_path": "p"}
        assert (await front.post("/load_lora_adapter", body))[0] == 200
        for method, given in (
            ("GET", None),
            ("PUT", {"path": "p"}),
            ("PATCH", {"pinned": True}),
            ("DELETE", {}),
        ):
            status, card = await ask(front, method, f"/v1/adapters/{raw}", given)
            assert (status, card["name"]) == (200, name), method


@pytest.mark.parametrize(
    ("method", "target", "body", "param"),
    [
        ("PUT", "a", {}, None),
        ("PUT", "a", b"", None),
        ("PUT", "a", {"path": ""}, "path"),
        ("PUT", "a", {"path": "p" * 5000}, "path"),
        ("PUT", "a", {"path": 1}, "path"),
        ("PUT", "a", {"path": "p", "rank": 4}, "rank"),
        ("PUT", "a", {"path": "p", "ttl_s": 0}, "ttl_s"),
        ("PUT", "a", {"path": "p", "ttl_s": 1e300}, "ttl_s"),
        ("PUT", "a", b'{"path": "p", "ttl_s": NaN}', None),
        ("PUT", "a", {"path": "p", "if_version": -1}, "if_version"),
        ("PUT", "a", {"path": "p", "if_version": 10**30}, "if_version"),
        ("PUT", "%FF", {"path": "p"}, "name"),
        ("PATCH", "a", {}, "pinned"),
        ("PATCH", "a", {"if_version": 1}, "pinned"),
        ("PATCH", "a", {"pinned": None}, "pinned"),
        ("PATCH", "a", {"path": "p", "pinned": True}, "path"),
        ("DELETE", "a", {"drain_s": -1}, "drain_s"),
        ("DELETE", "a", {"drain_s": 5, "force": True}, "force"),
        ("DELETE", "a?drain_s=soon", None, "drain_s"),
        ("DELETE", "a?drain_s=nan", None, "drain_s"),
        ("DELETE", "a?drain_s=1&drain_s=2", None, "drain_s"),
        ("DELETE", "a?force=perhaps", None, "force"),
        ("DELETE", "a?now=1", None, "now"),
        ("DELETE", "a?force=true", {"force": True}, None),
    ],
)
@in_loop
async def test_what_is_malformed_is_a_400_that_says_where(
    tokenizer_dir: Path, method: str, target: str, body: Any, param: str | None
) -> None:
    async with served(tokenizer_dir) as front:
        status, answer = await ask(front, method, f"/v1/adapters/{target}", body)
        assert (status, error_of(answer)) == (400, ("invalid_request", param))
        assert not front.scheduler.received


@pytest.mark.parametrize(
    ("target", "body", "drain_s", "if_version"),
    [
        ("a", {}, None, None),
        ("a", {"force": True, "drain_s": None}, 0.0, None),
        ("a", {"drain_s": 2.5, "if_version": 3}, 2.5, 3),
        ("a?drain_s=2.5&if_version=3", None, 2.5, 3),
        ("a?force=true", None, 0.0, None),
        ("a?force=false", None, None, None),
    ],
)
@in_loop
async def test_a_delete_says_how_long_it_waits(
    tokenizer_dir: Path, target: str, body: Any, drain_s: float | None, if_version: int | None
) -> None:
    async with served(tokenizer_dir) as front:
        await ask(front, "PUT", "/v1/adapters/a", {"path": "p"})
        assert (await ask(front, "DELETE", f"/v1/adapters/{target}", body))[0] == 200
        unload = front.scheduler.received[-1]
        assert isinstance(unload, UnloadAdapter)
        assert (unload.drain_s, unload.if_version) == (drain_s, if_version)


@pytest.mark.parametrize(
    ("error", "status", "param", "seeds_status"),
    [
        (AdapterExistsError("x", param="lora_name"), 409, "name", 400),
        (AdapterBusyError("x", param="lora_name"), 409, "name", 400),
        (VersionConflictError("x", param="if_version"), 409, "if_version", 409),
        (AdapterLimitError("x", param="pinned"), 409, "pinned", 400),
        (AdapterRejectedError("x", param="lora_path"), 422, "path", 400),
        (AdapterChangedError("x", param="lora_path"), 422, "path", 400),
        (BadRequestError("x", param="lora_name"), 400, "name", 400),
        (LoRADisabledError("x"), 400, None, 400),
        (ShuttingDownError("x"), 503, None, 503),
    ],
)
@in_loop
async def test_the_status_of_a_refusal_is_that_of_the_route(
    tokenizer_dir: Path, error: ManyloraError, status: int, param: str | None, seeds_status: int
) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.load_refusal = error
        answered, answer = await ask(front, "PUT", "/v1/adapters/a", {"path": "p"})
        assert (answered, error_of(answer)) == (status, (error.code, param))
        body = {"lora_name": "a", "lora_path": "p"}
        assert (await front.post("/load_lora_adapter", body))[0] == seeds_status


@pytest.mark.parametrize("method", ["PUT", "DELETE"])
@in_loop
async def test_what_was_asked_for_goes_on_when_the_client_leaves(tokenizer_dir: Path, method: str) -> None:
    async with served(tokenizer_dir) as front:
        await ask(front, "PUT", "/v1/adapters/a", {"path": "p"})
        before = len(front.scheduler.received)
        asking = asyncio.create_task(
            ask(front, method, "/v1/adapters/a", {"path": "q"} if method == "PUT" else {})
        )
        await until(lambda: len(front.scheduler.received) > before)
        asking.cancel()
        await asyncio.wait([asking])
        status, answer = await ask(front, "GET", "/v1/adapters/a")
        assert status == (200 if method == "PUT" else 404)
        assert method == "DELETE" or answer["path"] == "q"
