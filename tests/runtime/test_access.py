"""Who may call what: the decision as a table, and the server that holds to it."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import socket
from pathlib import Path

import pytest

from manylora.runtime.config import ModelArgs, ServerConfig
from manylora.runtime.http.access import LEVELS, refusal
from manylora.runtime.http.common import HttpState
from manylora.runtime.http.route import Access
from manylora.runtime.http.server import ROUTES, make_app
from manylora.runtime.keys import Keys
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager
from tests.runtime.http_front import HttpFront, served
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, fake_pair, in_loop
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

USER_KEY, OTHER_KEY, ADMIN_KEY = "user-key-0123456789", "user-key-abcdefghij", "admin-key-0123456789"
STRANGE_KEY = "unknown-key-0123456789"

# A route's level is a promise to whoever holds a key: changing one is a decision.
ACCESS = """
POST /generate user
PUT /generate user
POST /abort_request user
GET /health_generate user
POST /v1/completions user
POST /v1/chat/completions user
GET /v1/models user
GET /v1/models/{model} user
POST /load_lora_adapter admin
POST /unload_lora_adapter admin
GET /v1/adapters admin
GET /v1/adapters/{name} admin
PUT /v1/adapters/{name} admin
PATCH /v1/adapters/{name} admin
DELETE /v1/adapters/{name} admin
GET /health public
GET /get_model_info user
GET /get_server_info admin
GET /flush_cache admin
POST /flush_cache admin
GET /metrics user
GET /openapi.json public
GET / public
GET /dashboard/{file} public
"""
ONE_OF = {"/dashboard/{file}": "/dashboard/main.js"}  # a pattern is no path that it matches

# Rows: which keys the server was given. Columns: no key, an unknown one, an API key, an admin key.
DECISIONS = {
    Access.PUBLIC: {
        "none": "ok ok ok ok",
        "api": "ok ok ok ok",
        "admin": "ok ok ok ok",
        "both": "ok ok ok ok",
    },
    Access.USER: {
        "none": "ok ok ok ok",
        "api": "401 401 ok 401",
        "admin": "ok ok ok ok",
        "both": "401 401 ok ok",
    },
    Access.ADMIN: {
        "none": "ok ok ok ok",
        "api": "401 401 ok 401",
        "admin": "401 401 401 ok",
        "both": "401 401 403 ok",
    },
}


def digests(*keys: str) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


API, ADMIN = digests(OTHER_KEY, USER_KEY), digests(ADMIN_KEY)
SERVERS = {"none": Keys(), "api": Keys(api=API), "admin": Keys(admin=ADMIN), "both": Keys(API, ADMIN)}
CALLERS: list[list[str]] = [[], *([f"Bearer {key}"] for key in (STRANGE_KEY, USER_KEY, ADMIN_KEY))]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


def status(level: Access, authorization: list[str], keys: Keys) -> str:
    error = refusal(level, authorization, keys)
    return "ok" if error is None else str(error.status)


@pytest.mark.parametrize(("level", "given"), list(itertools.product(Access, SERVERS)))
def test_the_decisions(level: Access, given: str) -> None:
    answers = [status(level, caller, SERVERS[given]) for caller in CALLERS]
    assert answers == DECISIONS[level][given].split()


@pytest.mark.parametrize(
    ("header", "opens"),
    [
        (f"Bearer {USER_KEY}", True),
        (f"bearer  {USER_KEY} ", True),
        (f"Bearer {OTHER_KEY}", True),
        (USER_KEY, False),
        (f"Basic {USER_KEY}", False),
        (f"Bearer {USER_KEY[:-1]}", False),
        (f"Bearer {USER_KEY}x", False),
        (f"Bearer {USER_KEY.upper()}", False),
        (f"Bearer {USER_KEY} {OTHER_KEY}", False),
        (f"Bearer {USER_KEY},{OTHER_KEY}", False),
        ("Bearer", False),
        ("Bearer ", False),
        ("", False),
        ("Bearer schlüssel-0123456789", False),
        ("Bearer \udcff\udc80-0123456789", False),
        ("Bearer \ud800-0123456789", False),
    ],
)
def test_what_a_header_opens(header: str, opens: bool) -> None:
    assert (status(Access.USER, [header], SERVERS["both"]) == "ok") is opens


def test_two_headers_open_nothing() -> None:
    """What stands before us may have looked at the other."""
    good, bad = f"Bearer {USER_KEY}", f"Bearer {STRANGE_KEY}"
    for pair in ([good, bad], [bad, good], [good, good]):
        assert status(Access.USER, pair, SERVERS["api"]) == "401"


@pytest.mark.parametrize("given", SERVERS)
def test_a_page_of_another_site_is_not_let_in_without_a_key(given: str) -> None:
    keys = SERVERS[given]
    for level, caller in itertools.product(Access, CALLERS):
        plain, cross = refusal(level, caller, keys), refusal(level, caller, keys, cross_site=True)
        is_open = level is not Access.PUBLIC and refusal(level, [], keys) is None
        assert (cross is not None and cross.status == 403) if is_open else type(cross) is type(plain)


@in_loop
async def test_a_browser_says_which_page_sends(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        for site, status in (("cross-site", 403), ("same-origin", 200), ("none", 200)):
            async with front.client.get("/v1/models", headers={"Sec-Fetch-Site": site}) as response:
                assert response.status == status
        async with front.client.get("/health", headers={"Sec-Fetch-Site": "cross-site"}) as response:
            assert response.status == 200


def test_every_route_has_the_level_it_had() -> None:
    levels = [f"{route.method} {route.published_path} {route.access.value}" for route in ROUTES]
    assert levels == ACCESS.strip().splitlines()


@in_loop
async def test_no_route_is_served_without_a_level() -> None:
    async with fake_pair() as (_, pipe):
        manager = TokenizerManager(pipe)
        app = make_app(HttpState(ServerConfig(model=ModelArgs(model_path="m")), manager))
        levels = app[LEVELS]
        assert {route for route in app.router.routes() if route.method != "HEAD"} == set(levels)
        manager.close()


async def answer(
    front: HttpFront, method: str, path: str, key: str | None, body: bytes | None = None
) -> tuple[int, str]:
    """Status and the error's code, "" where there is none."""
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    async with front.client.request(method, path, data=body, headers=headers) as response:
        assert ("WWW-Authenticate" in response.headers) == (response.status == 401)
        error = (await response.json()).get("error") if response.status >= 400 else None
        return response.status, error["code"] if error else ""


@pytest.mark.parametrize("started", [True, False])
@in_loop
async def test_every_route_asks_before_anything_else(tokenizer_dir: Path, started: bool) -> None:
    """With a body that no route understands, and before the server is ready: a key comes first."""
    async with served(tokenizer_dir, keys=SERVERS["both"], started=started) as front:
        for route in ROUTES:
            body = b"{" if route.body is not None else None
            path = ONE_OF.get(route.published_path, route.path)
            first = (200, "") if started else (503, "not_ready")
            without = await answer(front, route.method, path, None, body)
            unknown = await answer(front, route.method, path, STRANGE_KEY, body)
            user = await answer(front, route.method, path, USER_KEY, body)
            assert (without == first) is (unknown == first) is (route.access is Access.PUBLIC), route.path
            if route.access is not Access.PUBLIC:
                assert without == unknown == (401, "unauthorized"), route.path
            assert (user == (403, "forbidden")) is (route.access is Access.ADMIN), route.path
            admin = await answer(front, route.method, path, ADMIN_KEY, body)
            assert admin[0] not in (401, 403, 500), route.path
            assert started or admin == first, route.path


@in_loop
async def test_without_a_key_no_route_differs_from_none(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir, keys=SERVERS["api"]) as front:
        bodies: list[bytes] = []
        for method, path in (("GET", "/no/such/route"), ("GET", "/generate"), ("GET", "/v1/models")):
            async with front.client.request(method, path) as response:
                assert response.status == 401
                assert "Allow" not in response.headers
                bodies.append(await response.read())
        assert len(set(bodies)) == 1
        assert await answer(front, "GET", "/no/such/route", USER_KEY) == (404, "not_found")
        assert await answer(front, "GET", "/generate", USER_KEY) == (405, "method_not_allowed")


@in_loop
async def test_an_admin_key_alone_leaves_the_users_routes_open(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir, keys=SERVERS["admin"]) as front:
        assert await answer(front, "POST", "/generate", None, b'{"text": "x"}') == (200, "")
        assert await answer(front, "POST", "/generate", STRANGE_KEY, b'{"text": "x"}') == (200, "")
        assert await answer(front, "GET", "/flush_cache", None) == (401, "unauthorized")
        assert await answer(front, "GET", "/no/such/route", None) == (404, "not_found")


@in_loop
async def test_a_refused_body_is_not_waited_for(tokenizer_dir: Path) -> None:
    """The answer comes though nothing of the announced body does."""
    async with served(tokenizer_dir, keys=SERVERS["api"]) as front:
        head = b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n"
        assert (await raw(front, head)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "token", [b"\xff\xfe-0123456789abcdef", "schlüssel-0123456789".encode(), b"a" * 4000]
)
@in_loop
async def test_whatever_bytes_a_key_has(tokenizer_dir: Path, token: bytes) -> None:
    async with served(tokenizer_dir, keys=SERVERS["api"]) as front:
        head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + token + b"\r\n\r\n"
        assert (await raw(front, head)).startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "headers", [b"X: " + b"a" * 70_000, b"\r\n".join(b"X%d: a" % i for i in range(5000))]
)
@in_loop
async def test_headers_are_bounded(tokenizer_dir: Path, headers: bytes) -> None:
    async with served(tokenizer_dir) as front:
        reply = await raw(front, b"GET /health HTTP/1.1\r\nHost: x\r\n" + headers + b"\r\n\r\n")
        assert b" 400 Bad Request\r\n" in reply
        assert await front.get("/health") == (200, "")


@pytest.mark.parametrize(
    "line", ["Authorization: Bearer {}\0", "Authorization Bearer {}", "Authorization: Bearer {:z<9000}"]
)
@in_loop
async def test_a_key_in_a_broken_request_is_not_logged(
    tokenizer_dir: Path, caplog: pytest.LogCaptureFixture, line: str
) -> None:
    async with served(tokenizer_dir, keys=SERVERS["api"]) as front:
        head = f"GET /v1/models HTTP/1.1\r\nHost: x\r\n{line.format(USER_KEY)}\r\n\r\n"
        assert b" 400 Bad Request\r\n" in await raw(front, head.encode())
        assert "Error handling request from 127.0.0.1: " in caplog.text
        assert USER_KEY not in caplog.text


async def raw(front: HttpFront, request: bytes) -> bytes:
    """The beginning of the answer to these bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", front.port, family=socket.AF_INET)
    try:
        writer.write(request)
        return await reader.read(1000)
    finally:
        writer.close()
