"""The HTTP server in the test's own event loop, over a real socket, with a fake scheduler behind its pipe."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from manylora.runtime.config import ModelArgs, ServerConfig
from manylora.runtime.http.common import HttpState
from manylora.runtime.http.server import serving
from manylora.runtime.keys import Keys
from manylora.runtime.launch import bind
from manylora.tokenizer_manager.chat_template import ChatTemplate, find_chat_template
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager
from tests.tokenizer_manager.fake_scheduler import FakeScheduler, fake_pair


@dataclass
class HttpFront:
    """A served front, its scheduler, and a client session whose base is the server."""

    state: HttpState
    scheduler: FakeScheduler
    client: aiohttp.ClientSession
    port: int

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and decoded answer. `body`: bytes as they are, anything else as JSON."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        async with self.client.post(path, data=data) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text

    async def get(self, path: str) -> tuple[int, Any]:
        async with self.client.get(path) as response:
            text = await response.text()
            is_json = response.content_type == "application/json"
            return response.status, json.loads(text) if is_json else text

    async def error(self, path: str, body: Any) -> tuple[int, str, str | None, str]:
        """Status, code, param and message of a request that must fail."""
        status, answer = await self.post(path, body)
        error = answer["error"]
        assert set(answer) == {"error"}
        assert set(error) == {"message", "type", "code", "param"}
        return status, error["code"], error["param"], error["message"]

    async def events(self, body: dict[str, Any], path: str = "/generate") -> list[Any]:
        """All server-sent events of a streaming route, decoded but for the last, [DONE]."""
        async with self.client.post(path, json={**body, "stream": True}) as response:
            assert response.status == 200
            assert response.headers["Content-Type"] == "text/event-stream; charset=utf-8"
            raw = (await response.read()).decode()
        frames = raw.split("\n\n")
        assert frames.pop() == ""
        assert all(frame.startswith("data: ") for frame in frames)
        data = [frame.removeprefix("data: ") for frame in frames]
        return [one if one == "[DONE]" else json.loads(one) for one in data]


@asynccontextmanager
async def served(
    tokenizer_dir: Path, *, started: bool = True, keys: Keys | None = None
) -> AsyncIterator[HttpFront]:
    """With `started` false the scheduler has not said anything yet. `keys`: those the server was given."""
    listener = bind("127.0.0.1", 0)
    listener.setblocking(False)
    config = ServerConfig(model=ModelArgs(model_path="org/base", served_model_name="base"))
    async with fake_pair() as (scheduler, pipe):
        manager = TokenizerManager(pipe)
        state = HttpState(config, manager, keys or Keys())
        try:
            if started:
                await scheduler.announce(tokenizer_dir)
                await manager.start()
                template = find_chat_template(tokenizer_dir)
                state.chat = ChatTemplate(template, manager.tokenizer.special_tokens)
                state.ready = True
            port = listener.getsockname()[1]
            async with serving(state, listener), aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
                yield HttpFront(state, scheduler, client, port)
        finally:
            state.chat.close()
            manager.close()
            listener.close()
            await asyncio.sleep(0)  # closed transports report in the next turn of the loop
