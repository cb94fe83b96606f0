"""A request's life in the scheduler: what is planned, what is cached, how it ends. Tokens are checked by `World`."""

from __future__ import annotations

from typing import Any

import pytest

from manylora.runtime.messages import Rejected
from manylora.runtime.plan import ForwardBatch, read_section
from tests.scheduler.fake_front import EOS, Expected
from tests.scheduler.fake_worker import NAN
from tests.scheduler.world import World

PROMPT = [1, 2, 3, 4, 5, 6, 8, 9, 10]


def error_of(sequence: Expected) -> Any:
    return sequence.finish.error


def plans_of(world: World) -> list[ForwardBatch]:
    """Every plan from now on."""
    plans: list[ForwardBatch] = []
    receive = world.worker.receive

    def record(message: Any) -> None:
        if isinstance(message, ForwardBatch):
            plans.append(message)
        receive(message)

    world.worker.receive = record  # type: ignore[method-assign]
    return plans


def test_a_request_prefills_in_chunks_and_then_decodes() -> None:
    world = World(chunk=4, overlap=False)
    plans = plans_of(world)
    (sequence,) = world.submit(PROMPT, max_new=3, ignore_eos=True)
    world.settle()
    assert sequence.finish.reason == "length"
    assert [read_section(plan, "rows")[0][1:3] for plan in plans] == [(0, 4), (4, 4), (8, 1), (9, 1), (10, 1)]
    assert [plan.count("samples") for plan in plans] == [0, 0, 1, 1, 1]
    assert [plan.num_prefill_rows for plan in plans] == [1, 1, 1, 0, 0]
    assert read_section(plans[3], "tokens") == [(-1,)]


def test_decode_comes_first_and_prefill_takes_what_is_left() -> None:
    world = World(chunk=8, max_running=4, overlap=False)
    world.submit(PROMPT[:4], max_new=8, ignore_eos=True)
    world.step()
    plans = plans_of(world)
    world.submit([20, 21, 22, 23, 24, 25, 26, 27, 28], max_new=1)
    world.step()
    (plan,) = plans
    assert [row[2] for row in read_section(plan, "rows")] == [7, 1]
    assert plan.num_prefill_rows == 1


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_the_second_time_all_but_the_last_token_is_cached(page_size: int) -> None:
    world = World(page_size=page_size)
    (first,) = world.submit(PROMPT)
    world.settle()
    (second,) = world.submit(PROMPT)
    world.settle()
    assert (first.cached, second.cached) == (0, 8)
    assert first.tokens == second.tokens


def test_without_the_radix_cache_nothing_is_shared_between_requests() -> None:
    world = World(radix=False)
    world.submit(PROMPT)
    world.settle()
    assert world.state().pages_free == world.num_pages
    (second,) = world.submit(PROMPT)
    world.settle()
    assert second.cached == 0


@pytest.mark.parametrize("radix", [True, False])
def test_samples_of_one_request_prefill_once(radix: bool) -> None:
    world = World(radix=radix)
    plans = plans_of(world)
    samples = world.submit(PROMPT, n=4, temperature=1.0, seed=5)
    world.settle()
    assert [s.cached for s in samples] == [0, 8, 8, 8]
    assert sum(plan.num_prefill_tokens for plan in plans) == 9 + 3
    assert len({tuple(s.tokens) for s in samples}) > 1
    assert world.state().pages_free == world.num_pages or radix


def test_when_the_first_sample_is_aborted_the_next_one_computes_the_prompt() -> None:
    world = World(chunk=4)
    samples = world.submit(PROMPT, n=3)
    world.step()
    world.abort(samples[0])
    world.settle()
    assert [s.cached for s in samples[1:]] == [4, 8]  # the first chunk had come back, the second had not
    assert all(s.finish.reason == "length" for s in samples[1:])


def test_zero_new_tokens_compute_the_prompt_only() -> None:
    world = World()
    (sequence,) = world.submit(PROMPT, max_new=0, num_top=1, logprob_start_len=2)
    world.settle()
    assert sequence.finish.reason == "length"
    assert sequence.generated == 0
    assert sequence.prompt_lps == 6


def test_prompt_logprobs_limit_the_reuse_of_prefixes() -> None:
    world = World()
    world.submit(PROMPT)
    world.settle()
    cached: list[int] = []
    for start in (0, 3, 8, -1):
        (sequence,) = world.submit(PROMPT, num_top=0, logprob_start_len=start)
        world.settle()
        cached.append(sequence.cached)
    assert cached == [0, 3, 8, 8]


def test_an_end_token_ends_and_is_reported() -> None:
    world = World()
    found = None
    for first in range(40):
        (sequence,) = world.submit([first], max_new=30)
        world.settle()
        if sequence.finish.reason == "stop":
            found = sequence
    assert found is not None
    assert found.finish.matched == EOS == found.tokens[-1]


def test_min_new_tokens_sends_the_banned_ids_with_the_slot() -> None:
    world = World()
    plans = plans_of(world)
    world.submit(PROMPT, max_new=6, min_new_tokens=4, stop_token_ids=[3, 11])
    world.settle()
    assert read_section(plans[0], "stop_ids") == [(0, 3), (0, EOS), (0, 11)]
    assert [plan.min_new for plan in plans if plan.count("samples")][:5] == [True] * 4 + [False]


def test_logits_that_are_not_finite_end_with_an_error_and_leave_no_cache() -> None:
    world = World()
    world.load_now("bad", f"{NAN}-weights")
    (sequence,) = world.submit(PROMPT, lora="bad")
    world.settle()
    assert error_of(sequence).code == "non_finite_logits"
    assert world.state().pages_cached == 1  # the adapter itself


def test_a_preempted_sequence_goes_on_with_the_same_tokens() -> None:
    alone = World(num_pages=64, max_running=1)
    crowd = World(num_pages=9, max_running=4)
    prompts = [[i, i + 1, i + 2] for i in range(20, 24)]
    results: list[list[list[int]]] = []
    for world in (alone, crowd):
        made = [world.submit(p, max_new=14, ignore_eos=True, temperature=1.0, seed=9)[0] for p in prompts]
        results.append(world.run(*made))
    assert results[0] == results[1]
    assert crowd.state().preemptions > 0


def test_overlap_on_and_off_give_the_same_tokens() -> None:
    results: list[list[list[int]]] = []
    for overlap in (True, False):
        world = World(overlap=overlap, num_pages=14, max_running=3)
        world.load_now("a", "pa")
        made = [
            world.submit([i, 2, 3], lora=lora, max_new=9, temperature=1.0, seed=i, frequency_penalty=1.0)[0]
            for i in range(6)
            for lora in (None, "a")
        ]
        results.append(world.run(*made))
    assert results[0] == results[1]


def test_two_steps_are_in_flight_and_the_wasted_row_is_dropped() -> None:
    world = World()
    (sequence,) = world.submit([1, 2], max_new=9, stop_token_ids=list(range(40)), ignore_eos=True)
    world.schedule()
    assert len(world.worker.flights) == 2
    world.settle()
    assert sequence.generated == 1


def test_a_request_that_can_never_fit_is_refused_and_the_largest_that_can_runs() -> None:
    world = World(num_pages=5, page_size=4)
    (too_long,) = world.submit([1] * 12, max_new=10)
    assert too_long.finish.error.code == "context_length_exceeded"
    (fits,) = world.submit([1] * 12, max_new=9, ignore_eos=True)
    world.settle()
    assert fits.generated == 9


def test_the_quota_on_kv_tokens_holds() -> None:
    world = World(num_pages=40, max_total_tokens=12)
    (too_long,) = world.submit([1] * 10, max_new=4)
    assert too_long.finish.error.code == "context_length_exceeded"
    for i in range(5):
        world.submit([i, 1, 2, 3], max_new=5, ignore_eos=True)
    world.settle()
    assert world.state().pages_cached <= 3


def test_the_context_length_is_a_limit_of_prompt_and_answer() -> None:
    world = World(context=16)
    (at_limit,) = world.submit(PROMPT, max_new=7, ignore_eos=True)
    (over,) = world.submit(PROMPT, max_new=8)
    world.settle()
    assert at_limit.finish.reason == "length"
    assert over.finish.error.code == "context_length_exceeded"


def test_a_call_is_refused_whole() -> None:
    world = World(context=16)
    good, bad = world.submit_all([(PROMPT, None, 2, -1, -1, {}), (PROMPT, None, 99, -1, -1, {})])
    assert isinstance(good.finish, Rejected)
    assert good.finish is bad.finish
    assert world.state().waiting == 0


def test_the_queue_is_bounded() -> None:
    world = World(max_queued=3)
    world.submit([1], n=2)
    (one_too_many, _) = world.submit([1], n=2)
    assert one_too_many.finish.error.code == "queue_full"
    world.settle()
    (later,) = world.submit([1])
    world.settle()
    assert later.finish.reason == "length"


def test_an_abort_frees_waiting_and_running_alike() -> None:
    world = World(max_running=1, radix=False)
    running, waiting = world.submit(PROMPT, max_new=9)[0], world.submit(PROMPT)[0]
    world.step()
    world.abort(running, waiting)
    world.settle()
    assert running.generated <= 1
    assert world.state().pages_free == world.num_pages


def test_flush_forgets_prefixes_when_nothing_runs() -> None:
    world = World()
    world.submit(PROMPT)
    assert world.flush().error.code == "busy"  # type: ignore[union-attr]
    world.settle()
    assert world.state().pages_cached == 3
    assert world.flush().error is None
    assert world.state().pages_free == world.num_pages


def test_too_many_stop_ids_are_refused() -> None:
    world = World()
    (sequence,) = world.submit([1], stop_token_ids=list(range(8, 40)) * 3)
    assert sequence.finish is None  # they are 33 distinct ones, with the model's own
    world.settle()
    (empty,) = world.submit([])
    assert empty.finish.error.message == "input_ids cannot be empty."
