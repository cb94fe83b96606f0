"""Adapters that come, change and go while others use them, with a client-side record of what was true when.

`Churn` owns the names: only it loads, replaces and unloads. For each name it keeps the versions it asked for, each with
the time from which and until which an answer may honestly come from it, and the times at which there may be none.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import torch

from tests.signature import PATHS, build_signature_adapter, signature_token

RANKS = (1, 8, 24, 64)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Span:
    """From when until when something may have been so, as the client can know it."""

    since: float
    until: float = math.inf

    def meets(self, sent: float, ended: float) -> bool:
        return self.since <= ended and sent <= self.until


@dataclass
class Name:
    """`lives`: the versions in order, with their tokens; `gaps`: when the name may have meant nothing."""

    number: int
    lives: list[tuple[int, Span]] = field(default_factory=list)
    gaps: list[Span] = field(default_factory=lambda: [Span(-math.inf)])
    busy: bool = False

    @property
    def lora_name(self) -> str:
        return f"adapter-{self.number}"

    @property
    def loaded(self) -> bool:
        return not math.isinf(self.gaps[-1].until)

    def honest_tokens(self, sent: float, ended: float) -> set[int]:
        """What a request that was sent and ended then may have been told."""
        return {token for token, span in self.lives if span.meets(sent, ended)}

    def may_be_missing(self, sent: float, ended: float) -> bool:
        return any(gap.meets(sent, ended) for gap in self.gaps)


class Churn:
    """`num_names` signature adapters below `directory`, served at `url`."""

    def __init__(self, url: str, directory: Path, num_names: int, seed: int) -> None:
        self._url = url
        self._directory = directory
        self._random = random.Random(seed)
        self.names = [Name(number) for number in range(num_names)]
        self.changes = 0
        self.stopped = False

    async def load(self, session: aiohttp.ClientSession, name: Name) -> None:
        """Load the next version; where one is loaded, replace it."""
        number, version = name.number, len(name.lives)
        token = signature_token(number, version, num_adapters=len(self.names))
        path = self._directory / f"{number}-{version}"
        build_signature_adapter(
            path,
            PATHS[(number + version) % len(PATHS)],
            token,
            rank=RANKS[(number + 2 * version) % len(RANKS)],
            dtype=DTYPES[(number + version) % len(DTYPES)],
            seed=number,
        )
        replaces = name.loaded
        name.lives.append((token, Span(time.monotonic())))
        reply = await self._post(
            session,
            "/load_lora_adapter",
            {"lora_name": name.lora_name, "lora_path": str(path), "replace": replaces},
        )
        assert reply["loaded_adapters"][name.lora_name] == str(path)
        if replaces:
            name.lives[-2][1].until = time.monotonic()
        else:
            name.gaps[-1].until = time.monotonic()

    async def unload(self, session: aiohttp.ClientSession, name: Name) -> None:
        name.gaps.append(Span(time.monotonic()))
        reply = await self._post(session, "/unload_lora_adapter", {"lora_name": name.lora_name})
        assert name.lora_name not in reply["loaded_adapters"]
        name.lives[-1][1].until = time.monotonic()

    async def change_something(self, session: aiohttp.ClientSession) -> None:
        """Load a name that is not loaded; else replace or unload one."""
        name = self._random.choice([name for name in self.names if not name.busy])
        name.busy = True
        if name.loaded and self._random.random() < 0.2:
            await self.unload(session, name)
        else:
            await self.load(session, name)
        name.busy = False
        self.changes += 1

    async def run(self, session: aiohttp.ClientSession) -> None:
        """Change one thing after the other, with little pauses, until `stopped` is set."""
        while not self.stopped:
            await self.change_something(session)
            await asyncio.sleep(self._random.uniform(0, 0.05))

    async def unload_all(self, session: aiohttp.ClientSession) -> None:
        for name in self.names:
            if name.loaded:
                await self.unload(session, name)

    async def _post(self, session: aiohttp.ClientSession, path: str, body: dict[str, Any]) -> dict[str, Any]:
        async with session.post(self._url + path, json=body) as response:
            reply = await response.json()
            assert response.status == 200, reply
            assert reply["success"] is True
            return reply
