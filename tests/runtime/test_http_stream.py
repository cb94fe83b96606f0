"""`/generate` with `stream`, clients that leave, aborts and a dead engine."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from pathlib import Path

import pytest

from manylora.runtime.errors import NonFiniteLogitsError, WorkerCrashedError
from tests.runtime.http_front import served
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, in_loop, until
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

GREEDY = {"temperature": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@in_loop
async def test_stream_of_one(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        body = {"text": "日本の首都は東京です。", "sampling_params": {"max_new_tokens": 30}}
        *events, done = await front.events(body)
        assert done == "[DONE]"
        texts = [event["text"] for event in events]
        assert len(texts) > 5
        assert all("index" not in event for event in events)
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
        assert [event["meta_info"]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 1)
        _, whole = await front.post("/generate", body)
        assert events[-1]["text"] == whole["text"]
        assert events[-1]["output_ids"] == whole["output_ids"]
        assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 30}


@in_loop
async def test_stream_of_a_batch_is_interleaved(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        body = {"text": ["x", "y"], "sampling_params": [{"max_new_tokens": 3}, {"max_new_tokens": 6}]}
        *events, done = await front.events(body)
        assert done == "[DONE]"
        last = {event["index"]: event["meta_info"] for event in events}
        assert {index: meta["completion_tokens"] for index, meta in last.items()} == {0: 3, 1: 6}
        assert [event["index"] for event in events[:2]] == [0, 1]


@in_loop
async def test_stop_string_in_a_stream(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        letters = [front.state.manager.tokenizer.pieces.index(c.encode()) for c in "abc END def"]
        front.scheduler.answer = lambda _: letters
        *events, _ = await front.events({"text": "x", "sampling_params": {"stop": "END"}})
        assert events[-1]["text"] == "abc "
        assert events[-1]["meta_info"]["finish_reason"] == {"type": "stop", "matched": "END"}
        assert not any("E" in event["text"] for event in events)
        await until(lambda: front.scheduler.aborted)


@in_loop
async def test_error_in_a_stream(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.failing_token = (3, NonFiniteLogitsError("the logits are not finite"))
        *events, done = await front.events({"text": "x"})
        assert done == "[DONE]"
        assert events[0]["meta_info"]["completion_tokens"] == 1
        assert events[-1] == {
            "error": {
                "message": "the logits are not finite",
                "type": "server_error",
                "code": "non_finite_logits",
                "param": None,
            }
        }


@in_loop
async def test_error_without_a_stream(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.failing_token = (3, NonFiniteLogitsError("the logits are not finite"))
        status, code, _, _ = await front.error("/generate", {"text": "x"})
        assert (status, code) == (500, "non_finite_logits")


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_client_that_leaves_aborts_its_sequences(tokenizer_dir: Path, stream: bool) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.held = not stream
        body = {"text": ["x", "y"], "sampling_params": {"max_new_tokens": 240, "n": 2}, "stream": stream}
        asking = asyncio.create_task(front.post("/generate", body))
        await until(lambda: len(front.scheduler.running) == 4)
        asking.cancel()
        await until(lambda: sorted(front.scheduler.aborted) == [1, 2, 3, 4])
        assert not front.scheduler.running


@in_loop
async def test_abort_request(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.held = True
        body = {"text": "x", "rid": "job-7"}
        asking = asyncio.create_task(front.post("/generate", body))
        await until(lambda: front.scheduler.running)
        assert await front.post("/abort_request", {"rid": "job"}) == (200, "")
        status, answer = await asking
        assert status == 200
        assert answer["text"] == ""
        assert answer["meta_info"]["finish_reason"]["type"] == "abort"
        await until(lambda: not front.scheduler.running)
        asking = asyncio.create_task(front.post("/generate", body))
        await until(lambda: front.scheduler.running)
        assert await front.post("/abort_request", {"abort_all": True}) == (200, "")
        assert (await asking)[0] == 200
        status, _, param, _ = await front.error("/abort_request", {})
        assert (status, param) == (400, "rid")


@in_loop
async def test_a_dead_engine_is_an_honest_error(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.held = True
        asking = asyncio.create_task(front.error("/generate", {"text": "x"}))
        await until(lambda: front.scheduler.running)
        front.state.manager.fail(WorkerCrashedError("worker 0 died"))
        assert await asking == (500, "worker_crashed", None, "worker 0 died")
        assert (await front.error("/generate", {"text": "x"}))[1] == "worker_crashed"
        assert (await front.get("/health"))[0] == 500
