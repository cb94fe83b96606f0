"""A TokenizerManager in the running loop with a fake scheduler behind it, and short ways to call it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.answer import Answer
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager
from tests.tokenizer_manager.fake_scheduler import (
    FakeScheduler,
    fake_pair,
)


@asynccontextmanager
async def managed(tokenizer_dir: Path) -> AsyncIterator[tuple[TokenizerManager, FakeScheduler]]:
    async with fake_pair() as (scheduler, pipe):
        manager = TokenizerManager(pipe)
        try:
            await scheduler.announce(tokenizer_dir)
            await manager.start()
            yield manager, scheduler
        finally:
            manager.close()


def one(text: str = "Paris.", *, rid: str = "a", lora_name: str | None = None, **params: Any) -> GenerateCall:
    return GenerateCall([Prompt(rid, SamplingParams(**params), text=text, lora_name=lora_name)])


def ids_of(manager: TokenizerManager, text: str) -> list[int]:
    """Without BOS."""
    return manager.tokenizer.encode([text])[0][1:]


async def collect(manager: TokenizerManager, call: GenerateCall) -> list[Answer]:
    return [answer async for answers in manager.stream(call) for answer in answers]
