"""Grammars in the scheduler: when a call is accepted, which steps its rows take, how they end. Tokens are checked by `World`."""

from __future__ import annotations

from typing import Any

import pytest

from manylora.runtime.messages import GenerateReq, Rejected, Submit, pack_i32
from manylora.runtime.sampling_params import SamplingParams
from manylora.scheduler.grammar import CompileJob, Constraint, MaskJob, without
from manylora.scheduler.grammar_desk import MAX_COMPILING
from tests.scheduler import fake_grammar
from tests.scheduler.fake_front import EOS, Expected
from tests.scheduler.fake_grammar import BAD, STUCK, FakeMatcher
from tests.scheduler.test_requests import plans_of
from tests.scheduler.world import World

PROMPT = [1, 2, 3, 4, 5, 6, 8, 9, 10]


def code_of(sequence: Expected) -> str:
    return sequence.finish.error.code


def compiled(world: World, *texts: str) -> None:
    """Have the scheduler know these grammars."""
    for text in texts:
        world.submit([1, 2], max_new=1, regex=text)
    world.settle()


def test_a_call_waits_for_its_grammar_and_nobody_waits_for_the_call() -> None:
    world = World()
    (limited,) = world.submit(PROMPT, max_new=6, regex="3")
    (plain,) = world.submit(PROMPT, max_new=6)
    while plain.finish is None:
        world.step()
    assert [type(job) for job in world.grammar_jobs] == [CompileJob]
    assert not limited.started
    world.settle()
    assert limited.finish.reason == "stop"
    assert 1 <= limited.generated <= 3


def test_a_bad_grammar_refuses_the_whole_call() -> None:
    world = World()
    entry = (PROMPT, None, 4, -1, -1)
    calls = world.submit_all([(*entry, {}), (*entry, {"regex": f"{BAD}3"}), (*entry, {"regex": "3"})])
    world.settle()
    for sequence in calls:
        assert isinstance(sequence.finish, Rejected)
        assert (code_of(sequence), sequence.finish.error.param) == ("bad_grammar", "sampling_params.regex")
    (again,) = world.submit(PROMPT, regex=f"{BAD}3")
    assert not world.grammar_jobs, "compiled twice"
    assert code_of(again) == "bad_grammar"
    world.assert_nothing_left()


def test_a_grammar_is_compiled_once() -> None:
    world = World()
    world.submit(PROMPT, regex="5", n=3)
    world.submit(PROMPT, regex="5")
    assert len(world.grammar_jobs) == 1
    world.settle()
    world.submit(PROMPT, regex="5")
    assert not world.grammar_jobs
    world.settle()
    world.assert_nothing_left()


def test_calls_that_wait_for_grammars_are_bounded() -> None:
    world = World(max_queued=4)
    world.submit(PROMPT, regex="5", n=3)
    (refused, _) = world.submit(PROMPT, regex="6", n=2)
    assert code_of(refused) == "queue_full"
    (last,) = world.submit(PROMPT, max_new=8, regex="7")
    world.settle()
    assert last.finish.reason == "stop"


def test_a_call_may_be_aborted_while_it_waits_for_its_grammar() -> None:
    world = World()
    gone, stays = world.submit(PROMPT, max_new=8, regex="5", n=2)
    world.abort(gone)
    world.settle()
    assert (gone.started, stays.finish.reason) == (False, "stop")
    world.assert_nothing_left()


def test_the_cache_is_not_flushed_under_a_call_that_waits_for_its_grammar() -> None:
    world = World()
    world.submit(PROMPT, regex="5")
    error: Any = world.flush().error
    assert error.code == "busy"
    world.settle()


def test_a_call_that_nobody_waits_for_is_forgotten() -> None:
    world = World()
    world.abort(*world.submit(PROMPT, regex="5", n=2))
    assert world.flush().error is None
    world.settle()
    world.assert_nothing_left()


def test_callers_that_leave_do_not_pile_up_grammars() -> None:
    world = World()
    for text in range(200):
        world.abort(*world.submit(PROMPT, regex=f"{text}"))
    assert len(world.grammar_jobs) == MAX_COMPILING
    (refused,) = world.submit(PROMPT, regex="9999")
    assert code_of(refused) == "queue_full"
    while world.grammar_jobs:
        world.finish_grammar_job()
    (last,) = world.submit(PROMPT, max_new=8, regex="7777")
    world.settle()
    assert last.finish.reason == "stop"


def test_that_a_grammar_took_too_long_is_not_remembered() -> None:
    world = World()
    (slow,) = world.submit(PROMPT, max_new=8, regex="5")
    world.finish_grammar_job(fail=True)
    assert code_of(slow) == "grammar_too_complex"
    (again,) = world.submit(PROMPT, max_new=8, regex="5")
    world.settle()
    assert again.finish.reason == "stop"


def test_a_limited_row_takes_every_second_step_and_the_others_every_one() -> None:
    world = World(max_running=4)
    compiled(world, "9", "b9")
    plans = plans_of(world)
    world.submit(PROMPT, max_new=9, regex="9", ignore_eos=True)
    world.submit(list(range(20, 29)), max_new=9, ignore_eos=True)
    world.schedule()
    for _ in range(6):
        world.scheduler.on_worker(world.worker.flights.popleft().output)
        world._deliver()
        while world.grammar_jobs:
            world.finish_grammar_job()
        world.schedule()
    assert [plan.num_rows for plan in plans] == [2, 1] * 4
    assert [plan.count("masked") for plan in plans] == [1, 0] * 4
    assert len(world.worker.flights) == 2
    world.settle()


def test_no_step_waits_for_a_mask() -> None:
    world = World()
    compiled(world, "9")
    (limited,) = world.submit(PROMPT, max_new=9, regex="9")
    (plain,) = world.submit(list(range(20, 29)), max_new=9, ignore_eos=True)
    while plain.finish is None:
        world.step()
    assert limited.generated == 1
    assert [type(job) for job in world.grammar_jobs] == [MaskJob]
    world.settle()
    assert limited.finish is not None


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_rows_go_on_where_they_were(overlap: bool) -> None:
    world = World(num_pages=14, page_size=2, max_running=6, overlap=overlap, radix=False)
    made: list[Expected] = []
    for start in range(4):
        made += world.submit([start, 30, 31], max_new=9, regex="9", ignore_eos=True)
        made += world.submit([start, 32, 33], max_new=9, ignore_eos=True)
    world.settle()
    assert world.state().preemptions > 0
    assert all(sequence.finish.reason in ("stop", "length") for sequence in made)
    world.assert_nothing_left()


def test_a_preempted_row_does_not_enter_before_its_mask_is_there() -> None:
    world = World(overlap=True)
    compiled(world, "9")
    (limited,) = world.submit(PROMPT, max_new=9, regex="9")
    world.step()
    assert len(world.grammar_jobs) == 1
    roster = world.scheduler._roster
    roster.preempt(roster.running[0])
    for _ in range(3):
        world.step()
    assert not world.worker.flights
    assert world.state().waiting == 1
    world.settle()
    assert limited.finish.reason == "stop"


def test_a_text_that_fills_the_limit_stops_and_a_longer_one_is_cut() -> None:
    world = World()
    (whole,) = world.submit(PROMPT, max_new=2, regex="2", ignore_eos=True)
    (cut,) = world.submit(PROMPT, max_new=2, regex="9", ignore_eos=True)
    world.settle()
    assert (whole.finish.reason, whole.generated) == ("stop", 2)
    assert (cut.finish.reason, cut.generated) == ("length", 2)


def test_no_token_means_no_grammar() -> None:
    world = World()
    (sequence,) = world.submit(PROMPT, max_new=0, regex="3")
    assert not world.grammar_jobs
    world.settle()
    assert sequence.finish.reason == "length"


def test_a_grammar_that_cannot_go_on_is_an_error_of_its_row_alone() -> None:
    world = World()
    compiled(world, f"{STUCK}5", "5")
    (stuck,) = world.submit(PROMPT, max_new=8, regex=f"{STUCK}5", ignore_eos=True)
    (late,) = world.submit(list(range(20, 29)), max_new=8, regex="5", ignore_eos=True)
    (plain,) = world.submit(PROMPT, max_new=8, ignore_eos=True)
    failed = False
    while stuck.finish is None or late.finish is None:
        world.schedule()
        while world.grammar_jobs:
            job: Any = world.grammar_jobs[0]
            mine = job.constraint.handle == late.request.handle and late.generated == 3
            failed |= mine
            world.finish_grammar_job(fail=mine)
        if world.worker.flights:
            world.complete_step()
    assert failed
    assert code_of(stuck) == code_of(late) == "grammar_too_complex"
    world.settle()
    assert plain.finish.reason == "length"
    world.assert_nothing_left()


def test_what_is_banned_never_leaves_nothing() -> None:
    params = SamplingParams(min_new_tokens=3, ignore_eos=True, stop_token_ids=[4])
    matcher = FakeMatcher("5")
    both = (1 << EOS | 1 << 12).to_bytes(8, "little")
    only_end = (1 << EOS).to_bytes(8, "little")
    assert Constraint(1, matcher, both, params, (EOS,)).mask == (1 << 12).to_bytes(8, "little")
    assert Constraint(1, matcher, only_end, params, (EOS,)).mask == only_end
    constraint = Constraint(1, matcher, both, params, (EOS,))
    assert (constraint.banned(2), constraint.banned(3)) == ((EOS, 4), (EOS,))
    assert without(both, (12, 63)) == only_end
    plain = Constraint(1, matcher, both, SamplingParams(min_new_tokens=3), (EOS,))
    assert (plain.banned(2), plain.banned(3)) == ((EOS,), ())


def test_a_parked_call_finds_its_adapter_gone() -> None:
    world = World()
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="a", regex="3")
    world.unload("a")
    world.settle()
    assert code_of(sequence) == "adapter_not_found"
    world.assert_nothing_left()


def test_a_call_of_two_grammars_waits_for_both() -> None:
    world = World()
    requests = [
        GenerateReq(handle, pack_i32(PROMPT), SamplingParams(max_new_tokens=2, temperature=0.0, regex=text))
        for handle, text in ((901, "2"), (902, "3"))
    ]
    world.scheduler.on_front(Submit(requests))
    world._deliver()
    assert len(world.grammar_jobs) == 2
    world.scheduler.on_grammar(fake_grammar.do(world.grammar_jobs.pop()))
    assert not world.scheduler._roster.live
    world.scheduler.on_grammar(fake_grammar.do(world.grammar_jobs.pop()))
    assert set(world.scheduler._roster.live) == {901, 902}
