"""Text as it arrives, and callers that leave."""

from __future__ import annotations

import asyncio
import contextlib
from itertools import pairwise
from pathlib import Path

from manylora.runtime.messages import StepOutput, pack_i32, pack_i64
from manylora.tokenizer_manager.answer import Answer, Length
from tests.tokenizer_manager.fake_scheduler import (
    in_loop,
    until,
)
from tests.tokenizer_manager.managed import collect, ids_of, managed, one


@in_loop
async def test_stream_grows_to_the_whole_answer(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        text = "日本の首都は東京です。 🙂 naïve"
        scheduler.answer = lambda _: ids_of(manager, text)
        call = one(max_new_tokens=len(ids_of(manager, text)))
        parts = await collect(manager, call)
        assert len(parts) > 5
        for earlier, later in pairwise(parts):
            assert later.text.startswith(earlier.text)
            assert earlier.meta_info.finish_reason is None
            assert "\N{REPLACEMENT CHARACTER}" not in earlier.text
        assert parts[-1].text == text
        assert parts[-1].meta_info.finish_reason == Length(len(parts[-1].output_ids))


@in_loop
async def test_stream_never_shows_a_part_of_a_stop_string(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        letters = [manager.tokenizer.pieces.index(char.encode()) for char in "one two three END four"]
        scheduler.answer = lambda _: letters
        parts = await collect(manager, one(stop=[" END", " thx"]))
        texts = [part.text for part in parts]
        assert texts[-1] == "one two three"
        assert "one two" in texts
        assert not any(text.endswith((" ", "E", "EN", " t", " th")) for text in texts)
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@in_loop
async def test_slow_reader_gets_fewer_and_longer_parts(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        count = 0
        last: list[Answer] = []
        async for answers in manager.stream(one(max_new_tokens=40)):
            count, last = count + 1, answers
            await asyncio.sleep(0.05)
        assert last[0].meta_info.completion_tokens == 40
        assert count < 20


@in_loop
async def test_a_caller_that_leaves_aborts_what_runs(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        async with contextlib.aclosing(manager.stream(one(n=2))) as answers:
            await anext(answers)
        await until(lambda: scheduler.aborted == [1, 2])

        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one()))
        await until(lambda: 3 in scheduler.running)
        waiting.cancel()
        await until(lambda: scheduler.aborted == [1, 2, 3])


@in_loop
async def test_late_tokens_are_dropped(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one()))
        await until(lambda: 1 in scheduler.running)
        waiting.cancel()
        await until(lambda: scheduler.aborted == [1])
        scheduler.pipe.send(StepOutput(pack_i64([1, 99]), pack_i32([5, 5])))
        scheduler.held = False
        [answer] = await manager.generate(one(max_new_tokens=1))
        assert answer.meta_info.completion_tokens == 1
