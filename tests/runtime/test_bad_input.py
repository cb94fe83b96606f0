"""What is not a request, or not one that any route takes: what each gets, in JSON with a code, and never a 500."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.http import common
from manylora.runtime.http.common import MAX_BODY_BYTES
from manylora.runtime.http.server import ROUTES
from tests.runtime.http_front import HttpFront, served
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, in_loop
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

DEPTH = 100_000


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


async def exchange(front: HttpFront, data: bytes, *later: bytes) -> tuple[int, dict[str, str], Any]:
    """Status, headers in lower case and decoded body of what is answered to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port)
    try:
        writer.write(data)
        for part in later:
            await asyncio.sleep(0.05)
            writer.write(part)
        head = (await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 20)).decode().split("\r\n")
        headers = {line.partition(":")[0].lower(): line.partition(":")[2].strip() for line in head[1:-2]}
        is_head = data.startswith(b"HEAD")
        body = b"" if is_head else await reader.readexactly(int(headers.get("content-length", 0)))
    finally:
        writer.close()
    is_json = headers.get("content-type", "").startswith("application/json")
    return int(head[0].split()[1]), headers, json.loads(body) if is_json and body else body


def request(method: str, path: str, body: bytes = b"", *headers: str) -> bytes:
    length = [f"Content-Length: {len(body)}"] if body else []
    head = [f"{method} {path} HTTP/1.1", "Host: x", "Connection: close", *length, *headers, "", ""]
    return "\r\n".join(head).encode() + body


MALFORMED: dict[str, bytes] = {
    "no HTTP": b"NONSENSE\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "version": b"GET /health HTTP/9.9\r\n\r\n",
    "method": request("FOO", "/health"),
    "no target": b"GET  HTTP/1.1\r\n\r\n",
    "no URL": request("GET", "http://[::/health"),
    "raw UTF-8 in the path": request("GET", "/v1/models/ä"),
    "NUL in the path": request("GET", "/v1/models/\0"),
    "long path": request("GET", "/" + "a" * 9000),
    "long header": request("GET", "/health", b"", "X: " + "a" * 9000),
    "many headers": request("GET", "/health", b"", *(f"X{i}: a" for i in range(3000))),
    "blank in a header's name": request("GET", "/health", b"", "X Y: a"),
    "NUL in a header": request("GET", "/health", b"", "X: a\0b"),
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "two hosts": request("GET", "/health", b"", "Host: y"),
    "two lengths": request("POST", "/generate", b"{}", "Content-Length: 3"),
    "negative length": request("POST", "/generate", b"", "Content-Length: -5"),
    "endless length": request("POST", "/generate", b"", "Content-Length: " + "9" * 30),
    "length and chunks": request("POST", "/generate", b"{}", "Transfer-Encoding: chunked"),
    "bad chunk": request("POST", "/generate", b"", "Transfer-Encoding: chunked") + b"ZZ\r\n",
    "unknown transfer": request("POST", "/generate", b"", "Transfer-Encoding: gzip") + b"abc",
}


@in_loop
async def test_what_is_no_http_is_refused_in_json(tokenizer_dir: Path) -> None:
    secret = "Authorization: Bearer a\0very-secret-key"
    async with served(tokenizer_dir) as front:
        for what, data in {**MALFORMED, "key": request("GET", "/health", b"", secret)}.items():
            status, headers, answer = await exchange(front, data)
            assert (status, headers["content-type"]) == (400, "application/json"), what
            error = answer["error"]
            assert (error["code"], error["type"]) == ("malformed_http", "invalid_request_error"), what
            assert 5 < len(error["message"]) < 120, what
            assert "secret" not in error["message"]
            assert "aaa" not in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "code", "allowed"),
    [
        ("GET", "/nowhere", 404, "not_found", None),
        ("GET", "//health", 404, "not_found", None),
        ("GET", "/v1/../health", 404, "not_found", None),
        ("GET", "/v1/models/", 404, "not_found", None),
        ("PUT", "/v1/adapters/", 404, "not_found", None),
        ("OPTIONS", "*", 404, "not_found", None),
        ("CONNECT", "x:80", 404, "not_found", None),
        ("HEAD", "/health", 405, None, "GET"),
        ("HEAD", "/generate", 405, None, "POST,PUT"),
        ("OPTIONS", "/generate", 405, "method_not_allowed", "POST,PUT"),
        ("TRACE", "/health", 405, "method_not_allowed", "GET"),
        ("POST", "/health", 405, "method_not_allowed", "GET"),
        ("POST", "/v1/adapters/x", 405, "method_not_allowed", "DELETE,GET,PATCH,PUT"),
    ],
)
@in_loop
async def test_no_such_route_or_method(
    tokenizer_dir: Path, method: str, path: str, status: int, code: str | None, allowed: str | None
) -> None:
    async with served(tokenizer_dir) as front:
        got, headers, answer = await exchange(front, request(method, path))
        assert (got, headers.get("allow")) == (status, allowed)
        assert (answer["error"]["code"] if code else answer) == (code or b"")


BODIES: dict[str, bytes] = {
    "empty": b"",
    "null": b"null",
    "list": b"[]",
    "text": b'"text"',
    "deep lists": b"[" * DEPTH,
    "deep objects": b'{"text":' * DEPTH,
    "NaN": b"NaN",
    "byte order mark": b"\xef\xbb\xbf{}",
    "UTF-16": "{}".encode("utf-16"),
    "invalid UTF-8": b'{"text": "\xff"}',
    "lone surrogate": b'{"rid": "\\ud800", "lora_name": "\\ud800", "path": "\\ud800", "model": "\\ud800"}',
    "NUL": b"\0",
    "something after it": b"{} {}",
    "form": b"text=x&lora_name=y",
}


@in_loop
async def test_every_route_with_a_body_refuses_what_is_none(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        for route in ROUTES:
            if route.body is None:
                continue
            path = route.published_path.replace("{name}", "x")
            for what, body in BODIES.items():
                if route.query is not None and not body:
                    continue  # it needs none
                status, _, answer = await exchange(front, request(route.method, path, body))
                code = answer["error"]["code"] if "error" in answer else answer["code"]
                assert (status, code) == (400, "invalid_request"), (route.method, path, what)
        assert not front.scheduler.received


@pytest.mark.parametrize(
    ("body", "param"),
    [
        (b'{"text": "x", "sampling_params": {"max_new_tokens": 1.0}}', "sampling_params.max_new_tokens"),
        (b'{"text": "x", "sampling_params": {"max_new_tokens": 1e2}}', "sampling_params.max_new_tokens"),
        (b'{"text": "x", "sampling_params": {"temperature": 1e400}}', "sampling_params.temperature"),
        (b'{"text": "x", "sampling_params": {"temperature": -Infinity}}', None),
        (b'{"text": "x", "sampling_params": {"seed": 9223372036854775808}}', "sampling_params.seed"),
        (b'{"text": "x", "sampling_params": {"seed": ' + b"9" * 5000 + b"}}", "sampling_params.seed"),
        (b'{"input_ids": [' + b"9" * 5000 + b"]}", "input_ids[0]"),
        (b'{"input_ids": [99999999999999999999999]}', "input_ids"),
        (b'{"input_ids": [-1]}', "input_ids"),
        (b'{"text": "x", "sampling_params": {"logit_bias": {"1.5": 1}}}', "sampling_params.logit_bias"),
    ],
)
@in_loop
async def test_numbers_that_do_not_fit(tokenizer_dir: Path, body: bytes, param: str | None) -> None:
    async with served(tokenizer_dir) as front:
        status, code, where, _ = await front.error("/generate", body)
        assert (status, code, where) == (400, "invalid_request", param)


@in_loop
async def test_a_schema_that_is_nested_deeply(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        schema = b'{"a":' * DEPTH + b"1" + b"}" * DEPTH
        parts = b'{"model":"base","prompt":"x","response_format":{"type":"json_schema","json_schema":{"name":"a","schema":'
        status, code, _, _ = await front.error("/v1/completions", parts + schema + b"}}}")
        assert (status, code) == (400, "invalid_request")


@in_loop
async def test_what_is_tolerated(tokenizer_dir: Path) -> None:
    """Of a key that comes twice the last counts, as in Python; the content type is not looked at, as curl sends a wrong one."""
    async with served(tokenizer_dir) as front:
        twice = b'{"text": "x", "rid": "first", "rid": "last", "sampling_params": {"max_new_tokens": 1}}'
        for kind in ("application/x-www-form-urlencoded", "text/html; charset=utf-99", "multipart/form-data"):
            status, _, answer = await exchange(
                front, request("POST", "/generate", twice, f"Content-Type: {kind}")
            )
            assert (status, answer["meta_info"]["id"]) == (200, "last")
        assert (await exchange(front, request("GET", "/health?%zz&a=%ff%00", b"ignored")))[0] == 200


@pytest.mark.parametrize(
    ("encoded", "name"),
    [
        ("a%2Fb", "a/b"),
        ("a/b", "a/b"),
        ("a%252Fb", "a%2Fb"),
        ("%2e%2e%2F..", "../.."),
        ("%00", "\0"),
        ("a%0Ab", "a\nb"),
        ("%C3%A4", "ä"),
        ("%F0%9F%98%80", "😀"),
        ("%", "%"),
        ("%zz", "%zz"),
        ("a%3Fb?x=1", "a?b"),
        ("+", "+"),
        ("%20", " "),
    ],
)
@in_loop
async def test_names_in_paths_are_decoded_once(tokenizer_dir: Path, encoded: str, name: str) -> None:
    async with served(tokenizer_dir) as front:
        status, _, answer = await exchange(front, request("GET", f"/v1/adapters/{encoded}"))
        error = answer["error"]
        assert (status, error["code"]) == (404, "adapter_not_found")
        assert error["message"] == f"LoRA with name {name} does not exist."
        status, _, answer = await exchange(front, request("GET", f"/v1/models/{encoded}"))
        assert status == 404
        assert answer["error"]["code"] in ("model_not_found", "not_found")


@pytest.mark.parametrize("encoded", ["%ff", "%ed%a0%80", "a%80"])
@in_loop
async def test_names_in_paths_are_utf8(tokenizer_dir: Path, encoded: str) -> None:
    async with served(tokenizer_dir) as front:
        for method, body in (("GET", b""), ("PUT", b'{"path": "x"}'), ("PATCH", b"{}"), ("DELETE", b"")):
            status, _, answer = await exchange(front, request(method, f"/v1/adapters/{encoded}", body))
            assert (status, answer["error"]["code"]) == (400, "invalid_request")
            assert answer["error"]["param"] == "name"
        assert (await exchange(front, request("GET", f"/v1/models/{encoded}")))[0] == 404
        assert not front.scheduler.received[1:]  # the question after the models


@pytest.mark.parametrize(
    "query",
    [
        *("drain_s=-1", "drain_s=nan", "drain_s=inf", "drain_s=1e400", "drain_s=", "drain_s=1&drain_s=2"),
        *("force", "force=yes", "force=%00", "if_version=%ff", "if_version=%2B1", "if_version=" + "9" * 5000),
        *("colour=red", "%ff=1"),
    ],
)
@in_loop
async def test_query_parameters_of_an_unload(tokenizer_dir: Path, query: str) -> None:
    async with served(tokenizer_dir) as front:
        status, _, answer = await exchange(front, request("DELETE", f"/v1/adapters/x?{query}"))
        assert (status, answer["error"]["code"]) == (400, "invalid_request")
        assert answer["error"]["param"] in (query.partition("=")[0], "\ufffd")
        assert not front.scheduler.received


async def endless() -> AsyncIterator[bytes]:
    for _ in range(MAX_BODY_BYTES // 2**20 + 2):
        yield b" " * 2**20


@in_loop
async def test_a_body_that_is_too_large(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        async with front.client.post(
            "/generate", data=endless()
        ) as response:  # in chunks, of no known length
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "request_entity_too_large"
        announced = request("POST", "/generate", b"", f"Content-Length: {MAX_BODY_BYTES + 1}")
        status, _, answer = await exchange(front, announced)  # before it came
        assert (status, answer["error"]["code"]) == (413, "request_entity_too_large")


@in_loop
async def test_a_body_that_does_not_come(tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "BODY_TIMEOUT_S", 0.3)
    async with served(tokenizer_dir) as front:
        chunked = request("POST", "/generate", b"", "Transfer-Encoding: chunked") + b"5\r\nabcde\r\n"
        for data, later in (
            (request("POST", "/generate", b"", "Content-Length: 9"), b"{"),
            (chunked, b"ZZ\r\n"),
        ):
            status, _, answer = await exchange(front, data, later)
            assert (status, answer["error"]["code"]) == (408, "request_timeout")


@in_loop
async def test_expectations(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        body = b'{"text": "x", "sampling_params": {"max_new_tokens": 1}}'
        head = request("POST", "/generate", b"", f"Content-Length: {len(body)}", "Expect: 100-continue")
        status, _, _ = await exchange(front, head)
        assert status == 100
        async with front.client.post("/generate", data=body, expect100=True) as response:
            assert response.status == 200
        for path in ("/generate", "/nowhere"):
            status, _, answer = await exchange(front, request("POST", path, body, "Expect: cake"))
            error = answer["error"]
            assert (status, error["code"], error["param"]) == (417, "expectation_failed", "Expect")
