"""What is counted of requests, for each way in which one can end."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from manylora.runtime.errors import BadRequestError, NonFiniteLogitsError, QueueFullError
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.request_metrics import Histogram, RequestMetrics
from tests.tokenizer_manager.fake_scheduler import CACHED_TOKENS, FakeScheduler, in_loop, until
from tests.tokenizer_manager.managed import ids_of, managed, one
from tests.tokenizer_manager.tiny_tokenizer import EOS_ID


def ends(metrics: RequestMetrics) -> dict[str, int]:
    return {reason: count for reason, count in metrics.finished.items() if count}


def test_a_histogram_counts_a_value_in_the_first_bucket_that_holds_it() -> None:
    histogram = Histogram((1, 2, 4))
    for value in (0.5, 1, 1.5, 4, 5):
        histogram.observe(value)
    histogram.observe(2, 10)
    assert histogram.counts == [2, 11, 1, 1]
    assert histogram.sum == 32


@in_loop
async def test_tokens_and_intervals(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        prompt = one("Paris.", max_new_tokens=5, n=3)
        answers = await manager.generate(prompt)
        metrics, length = manager.metrics, answers[0].meta_info.prompt_tokens
        assert (metrics.prompt_tokens, metrics.cached_tokens) == (3 * length, 3 * CACHED_TOKENS)
        assert metrics.generated_tokens == 15
        assert sum(metrics.first_token_s.counts) == sum(metrics.queue_s.counts) == 3
        assert sum(metrics.next_token_s.counts) == 12
        assert 0 < metrics.next_token_s.sum <= metrics.whole_s.sum
        assert metrics.first_token_s.sum <= metrics.whole_s.sum
        assert (metrics.prompt_length.sum, metrics.generated_length.sum) == (3 * length, 15)
        assert ends(metrics) == {"length": 3}
        metrics.clear()
        assert sum(metrics.whole_s.counts) == metrics.generated_tokens == metrics.finished["length"] == 0


@in_loop
async def test_tokens_that_come_together_are_one_interval(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.tokens_per_step = 3
        await manager.generate(one(max_new_tokens=7))
        assert manager.metrics.generated_tokens == 7
        assert sum(manager.metrics.next_token_s.counts) == 2


@in_loop
async def test_every_end_is_counted_once(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.answer = lambda _: [*ids_of(manager, "one two three"), EOS_ID]
        await manager.generate(one(max_new_tokens=100))
        await manager.generate(one(max_new_tokens=100, stop=["two"]))
        assert ends(manager.metrics) == {"stop": 2}
        await manager.generate(one(max_new_tokens=2))
        assert ends(manager.metrics) == {"stop": 2, "length": 1}
        assert sum(manager.metrics.whole_s.counts) == 3
        await end_by_others(manager, scheduler)
        assert ends(manager.metrics) == {"stop": 2, "length": 1, "abort": 3}
        scheduler.held = False
        scheduler.failing_token = (1, NonFiniteLogitsError("no number"))
        with pytest.raises(NonFiniteLogitsError):
            await manager.generate(one(max_new_tokens=100))
        assert ends(manager.metrics) == {"stop": 2, "length": 1, "abort": 3, "error": 1}
        assert manager.metrics.failed == {"non_finite_logits": 1}
        assert sum(manager.metrics.whole_s.counts) == 3


async def end_by_others(manager, scheduler: FakeScheduler) -> None:  # type: ignore[no-untyped-def]
    """One request is aborted, and two samples lose their client."""
    scheduler.held = True
    aborted = asyncio.create_task(manager.generate(one(rid="x", max_new_tokens=100)))
    await until(lambda: scheduler.running)
    manager.abort("x")
    await aborted
    left = asyncio.create_task(manager.generate(one(rid="y", max_new_tokens=100, n=2)))
    await until(lambda: len(scheduler.running) == 2)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)


@in_loop
async def test_what_is_refused_has_not_ended(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        with pytest.raises(BadRequestError):
            await manager.generate(one(max_new_tokens=-1))
        with pytest.raises(BadRequestError):
            await manager.generate(
                GenerateCall([Prompt("a", SamplingParams(), text="x", lora_name="\ud800")])
            )
        assert not manager.metrics.rejected
        scheduler.refusal = QueueFullError("full")
        with pytest.raises(QueueFullError):
            await manager.generate(one(n=4))
        assert manager.metrics.rejected == {"queue_full": 4}
        assert ends(manager.metrics) == {}
