"""What an operator does to adapters: guard a replacement, unload with a time limit, let one expire, pin; and what is counted."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest

from manylora.runtime.messages import AdapterState
from tests.scheduler.fake_front import Expected
from tests.scheduler.fake_grammar import BAD
from tests.scheduler.world import EPOCH, Adapter, World

PROMPT = [1, 2, 3, 4, 5]


def state_of(world: World, name: str) -> AdapterState:
    [state] = [adapter for adapter in world.state().adapters if adapter.lora_name == name]
    return state


def names(world: World) -> list[str]:
    return [adapter.lora_name for adapter in world.state().adapters]


def running(world: World, name: str, max_new: int = 12, **params: Any) -> list[Expected]:
    """A request of which a step is in flight."""
    sequences = world.submit(PROMPT, lora=name, max_new=max_new, ignore_eos=True, **params)
    while not world.worker.flights:
        world.schedule()
        while world.acks():
            world.ack()
    return sequences


# ---- compare and set ------------------------------------------------------------------------------------------------


def test_a_load_for_another_version_is_refused_with_the_one_it_is_at() -> None:
    world = World()
    assert world.load_now("a", "pa", if_version=0).reply.replaced == 0
    for wrong in (0, 2):
        error = world.load("a", "pb", replace=True, if_version=wrong).reply.error
        assert (error.code, error.status, error.param) == ("version_conflict", 409, "if_version")
        assert "is at version 1" in error.message
    error = world.load("b", "pb", replace=True, if_version=4).reply.error
    assert (error.code, "version 0" in error.message) == ("version_conflict", True)
    reply = world.load_now("a", "pb", replace=True, if_version=1).reply
    assert (reply.error, reply.replaced, reply.lora_version) == (None, 1, 2)
    assert not world.jobs


def test_a_load_whose_version_went_meanwhile_does_not_win() -> None:
    world = World()
    world.load_now("a", "pa")
    call = world.load("a", "pb", replace=True, if_version=1)
    assert world.load("a", "pc", replace=True, if_version=1).reply.error.code == "adapter_exists"
    assert world.unload("a").reply.error is None
    world.settle()
    assert call.reply.error.code == "version_conflict"
    assert names(world) == []
    world.assert_nothing_left()


@pytest.mark.parametrize("operation", ["unload", "update"])
def test_unload_and_update_are_guarded_too(operation: str) -> None:
    world = World()
    world.load_now("a", "pa")
    act = (
        world.unload
        if operation == "unload"
        else lambda name, **options: world.update(name, pinned=True, **options)
    )
    error = act("a", if_version=2).reply.error
    assert (error.code, error.status) == ("version_conflict", 409)
    assert not state_of(world, "a").pinned
    assert act("b").reply.error.code == "adapter_not_found"
    reply = act("a", if_version=1).reply
    assert (reply.error, reply.adapter.version) == (None, 1)


# ---- unload ---------------------------------------------------------------------------------------------------------


def test_an_unload_by_force_ends_what_runs_and_waits_with_its_own_error() -> None:
    world = World(max_running=1)
    world.load_now("a", "pa")
    (first,) = running(world, "a")
    (second,) = world.submit(PROMPT, lora="a")
    (base,) = world.submit(PROMPT)
    call = world.unload("a", drain_s=0.0)
    for sequence in (first, second):
        assert (sequence.finish.reason, sequence.finish.error.code) == ("error", "adapter_unloaded")
        assert sequence.finish.error.status == 410
    assert call.answered
    assert (call.reply.adapter.tier, call.reply.adapter.running, call.reply.adapter.waiting) == ("disk", 0, 0)
    world.settle()
    assert base.finish.reason == "length"
    world.assert_nothing_left()


def test_requests_have_until_the_deadline() -> None:
    world = World()
    world.load_now("a", "pa")
    (short,) = running(world, "a", max_new=2)
    (long,) = world.submit([9, 9], lora="a", max_new=60, ignore_eos=True)
    call = world.unload("a", drain_s=10.0)
    assert world.scheduler.seconds_to_due == 10.0
    for _ in range(6):
        world.step()
    assert short.finish.reason == "length"
    world.pass_time(9.9)
    assert not long.ended
    assert not call.answered
    world.pass_time(0.1)
    assert long.finish.error.code == "adapter_unloaded"
    assert call.reply.error is None
    assert world.scheduler.seconds_to_due is None
    world.assert_nothing_left()


def test_an_unload_that_need_not_hurry_is_answered_before_its_deadline() -> None:
    world = World()
    world.load_now("a", "pa")
    (sequence,) = running(world, "a", max_new=3)
    call = world.unload("a", drain_s=10.0)
    world.settle()
    assert (sequence.finish.reason, call.reply.error) == ("length", None)
    world.load_now("a", "pa")
    (other,) = running(world, "a")
    world.pass_time(11.0)
    assert not other.ended, "the deadline of the earlier unload"


def test_a_second_unload_may_hasten_the_first_but_not_join_it_idly() -> None:
    world = World()
    world.load_now("a", "pa")
    (sequence,) = running(world, "a", max_new=60)
    first = world.unload("a")
    assert world.unload("a").reply.error.code == "adapter_busy"
    assert world.unload("a", drain_s=1.0, if_version=3).reply.error.code == "version_conflict"
    second = world.unload("a", drain_s=5.0)
    assert (first.answered, second.answered) == (False, False)
    world.pass_time(5.0)
    assert sequence.finish.error.code == "adapter_unloaded"
    assert first.reply.error is second.reply.error is None
    assert world.unload("a", drain_s=0.0).reply.error.code == "adapter_not_found"


def test_an_unload_is_of_the_replaced_versions_too() -> None:
    world = World()
    world.load_now("a", "pa")
    (old,) = running(world, "a", max_new=60)
    world.load("a", "pb", replace=True)
    world.finish_job()
    while world.acks():
        world.ack()
    assert state_of(world, "a").version == 2
    patient = world.unload("a")
    assert not patient.answered, "a sequence of version 1 runs"
    forced = world.unload("a", drain_s=0.0)
    assert old.finish.error.code == "adapter_unloaded"
    assert patient.answered
    assert forced.reply.adapter.version == 2
    world.assert_nothing_left()


def test_an_unload_leaves_a_namesake_that_was_loaded_after_it_alone() -> None:
    world = World()
    world.load_now("a", "pa")
    (old,) = running(world, "a", max_new=60)
    first = world.unload("a")
    world.load("a", "pb")
    world.finish_job()
    while world.acks():
        world.ack()
    assert (state_of(world, "a").running, state_of(world, "a").requests) == (0, 0)
    (new,) = world.submit(PROMPT, lora="a", max_new=60, ignore_eos=True)
    assert world.unload("a", drain_s=0.0).reply.error is None
    assert new.finish.error.code == "adapter_unloaded"
    assert (old.ended, first.answered) == (False, False)
    world.settle()
    assert (old.finish.reason, first.reply.error) == ("length", None)


def test_an_adapter_that_is_being_loaded_for_the_first_time_cannot_be_unloaded() -> None:
    world = World()
    world.load("a", "pa")
    assert world.unload("a", drain_s=0.0).reply.error.code == "adapter_busy"
    world.settle()
    assert names(world) == ["a"]


def test_force_during_a_copy_waits_for_the_ranks() -> None:
    world = World(tp_size=2)
    world.load_now("a", "pa")
    (sequence,) = world.submit(PROMPT, lora="a")
    world.schedule()
    call = world.unload("a", drain_s=0.0)
    assert sequence.finish.error.code == "adapter_unloaded"
    assert not call.answered
    world.ack()
    world.ack()
    assert call.reply.error is None
    world.assert_nothing_left()


# ---- time without use -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pinned", [False, True])
def test_an_idle_adapter_goes_when_its_time_is_over(pinned: bool, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    world = World()
    world.load_now("a", "pa", ttl_s=5.0, pinned=pinned)
    world.load_now("b", "pb")
    world.pass_time(4.0)
    world.run(*world.submit(PROMPT, lora="a", max_new=2))
    world.pass_time(4.9)
    assert names(world) == ["a", "b"]
    world.pass_time(0.1)
    assert names(world) == ["b"]
    assert "LoRA adapter a was not used for its ttl_s of 5 s" in caplog.text
    assert world.submit(PROMPT, lora="a")[0].finish.error.code == "adapter_not_found"
    assert world.scheduler.seconds_to_due is None
    world.assert_nothing_left()


def test_adapters_whose_times_end_one_after_another_go_once_each() -> None:
    """The clock goes on while those whose time is over are unloaded, and others' ends meanwhile."""
    world = World()
    for name in "abcd":
        world.now = 0.001 * (name == "d")
        world.load_now(name, f"p{name}", ttl_s=5.0)
    readings = itertools.count()
    admin = world.scheduler._admin
    admin._times = dataclasses.replace(admin._times, now=lambda: 5.0005 + 0.001 * next(readings))
    world.scheduler.on_time()
    world.settle()
    assert names(world) == []
    assert world.unload("b", drain_s=0.0).reply.error.code == "adapter_not_found"


def test_time_stands_still_while_a_request_runs_or_waits() -> None:
    world = World(max_running=1)
    world.load_now("a", "pa", ttl_s=5.0)
    world.submit([9, 9], max_new=40, ignore_eos=True)
    world.step()
    (waiting,) = world.submit(PROMPT, lora="a", max_new=3)
    world.pass_time(50.0)
    assert names(world) == ["a"]
    assert world.run(waiting)
    assert world.scheduler.seconds_to_due == 5.0
    world.pass_time(5.0)
    assert names(world) == []


CODES = {"accepted": None, "refused": "bad_grammar", "aborted": None}


@pytest.mark.parametrize("fate", CODES)
def test_time_does_not_run_out_for_a_call_that_waits_for_its_grammar(fate: str) -> None:
    world = World()
    world.load_now("a", "pa", ttl_s=5.0)
    (sequence,) = world.submit(PROMPT, lora="a", max_new=3, regex=f"{BAD}3" if fate == "refused" else "3")
    world.pass_time(50.0)
    assert names(world) == ["a"]
    world.scheduler.check()
    if fate == "aborted":
        world.abort(sequence)
        world.scheduler.check()
    world.finish_grammar_job()
    world.scheduler.check()
    world.settle()
    if fate != "aborted":
        assert (sequence.finish.error and sequence.finish.error.code) == CODES[fate]
    assert world.scheduler.seconds_to_due == 5.0
    world.pass_time(4.9)
    assert names(world) == ["a"]
    world.pass_time(0.1)
    assert names(world) == []
    world.assert_nothing_left()


@pytest.mark.parametrize("anew", [False, True])
def test_nor_for_one_that_is_loaded_while_the_call_waits(anew: bool) -> None:
    """For the first time, or again after its name was taken away."""
    world = World()
    if anew:
        world.load_now("a", "pa", ttl_s=5.0)
    (sequence,) = world.submit(PROMPT, lora="a", max_new=3, regex="3")
    if anew:
        world.unload("a")
    world.load("a", "pb", ttl_s=5.0)
    while world.jobs or world.acks():  # but for the grammar
        world.finish_job() if world.jobs else world.ack()
    world.pass_time(50.0)
    world.scheduler.check()
    assert names(world) == ["a"]
    world.settle()
    assert sequence.finish.error is None
    world.pass_time(5.0)
    assert names(world) == []
    world.assert_nothing_left()


def test_a_replacement_sets_the_time_anew_and_is_not_overtaken_by_it() -> None:
    world = World()
    world.load_now("a", "pa", ttl_s=5.0)
    world.pass_time(4.0)
    failing = world.load("a", "pb", replace=True)
    world.pass_time(4.0)
    assert names(world) == ["a"], "while it is being replaced"
    world.finish_job(fail=True)
    assert failing.reply.error.code == "adapter_rejected"
    assert world.scheduler.seconds_to_due == 0.0
    assert world.load_now("a", "pb", replace=True).reply.error is None
    world.pass_time(50.0)
    assert (names(world), state_of(world, "a").ttl_s) == (["a"], None)


def test_a_failed_replacement_lets_the_time_run_out() -> None:
    world = World()
    world.load_now("a", "pa", ttl_s=5.0)
    world.load("a", "pb", replace=True)
    world.pass_time(6.0)
    world.finish_job(fail=True)
    world.pass_time(0.0)
    assert names(world) == []


def test_an_update_gives_or_takes_a_time() -> None:
    world = World()
    world.load_now("a", "pa")
    world.pass_time(3.0)
    reply = world.update("a", ttl_s=5.0).reply
    assert (reply.adapter.ttl_s, reply.adapter.version, reply.adapter.pinned) == (5.0, 1, False)
    assert world.scheduler.seconds_to_due == 2.0
    assert world.update("a", ttl_s=None).reply.adapter.ttl_s is None
    world.pass_time(50.0)
    assert names(world) == ["a"]
    world.update("a", ttl_s=5.0)
    world.pass_time(0.0)
    assert names(world) == [], "it has been idle for longer"


# ---- pins -----------------------------------------------------------------------------------------------------------


def test_a_pin_brings_an_adapter_into_memory_and_is_let_go_again() -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa")
    world.load_now("b", "pb")
    assert state_of(world, "a").tier == "disk"
    assert world.update("a", pinned=True).reply.adapter.pinned
    world.settle()
    assert (state_of(world, "a").tier, state_of(world, "a").loads) == ("resident", 1)
    world.run(*world.submit([9] * 60, max_new=8, ignore_eos=True))
    assert state_of(world, "a").tier == "resident"
    assert not world.update("a", pinned=False).reply.adapter.pinned
    world.run(*world.submit([9] * 84, max_new=8, ignore_eos=True))
    assert (state_of(world, "a").tier, state_of(world, "a").evictions) == ("host", 1)
    world.assert_nothing_left()


def test_pins_are_limited_as_those_of_loads() -> None:
    world = World(max_loras=2)
    for name in ("a", "b"):
        world.load_now(name, f"p{name}")
    assert world.update("a", pinned=True).reply.error is None
    assert world.update("a", pinned=True).reply.error is None
    error = world.update("b", pinned=True, ttl_s=1.0).reply.error
    assert (error.code, error.param) == ("adapter_limit", "pinned")
    assert (state_of(world, "b").pinned, state_of(world, "b").ttl_s) == (False, None)
    assert world.load("c", "pc", pinned=True).reply.error.code == "adapter_limit"


def test_a_pin_that_leaves_a_live_request_no_room_is_refused() -> None:
    world = World(num_pages=8, files={"pa": Adapter(num_pages=2)})
    world.load_now("a", "pa")
    world.submit([1] * 25, max_new=4)
    assert world.update("a", pinned=True).reply.error.code == "adapter_limit"
    assert not state_of(world, "a").pinned
    world.settle()
    assert world.update("a", pinned=True).reply.error is None


def test_a_pin_whose_files_have_changed_holds_up_nobody() -> None:
    world = World(max_loaded=1)
    world.load_now("a", "pa")
    world.load_now("b", "pb")
    world.files["pa"].edition = 1
    world.update("a", pinned=True)
    (other,) = world.submit(PROMPT, lora="b", max_new=3)
    world.settle()
    assert other.finish.reason == "length"
    assert (state_of(world, "a").pinned, state_of(world, "a").tier) == (True, "disk")
    assert not world.jobs, "it is not tried again and again"
    world.files["pa"].edition = 0
    world.update("a", pinned=True)
    world.settle()
    assert state_of(world, "a").tier == "resident"


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_counts_are_of_the_name_and_go_on_when_it_is_replaced() -> None:
    world = World(max_running=2)
    world.load_now("a", "pa")
    world.now = 7.0
    first = running(world, "a", n=3)
    world.now = 9.0
    state = state_of(world, "a")
    assert (state.requests, state.hits, state.loads) == (1, 0, 1)
    assert (state.running, state.waiting, state.leases) == (1, 2, 3)
    assert (state.loaded_at, state.last_use) == (EPOCH, EPOCH + 9)
    world.load("a", "pb", replace=True)
    world.finish_job()
    while world.acks():
        world.ack()
    second = world.submit(PROMPT, lora="a", max_new=5, ignore_eos=True)
    state = state_of(world, "a")
    assert (state.version, state.leases, state.running + state.waiting) == (2, 1, 4)
    assert state.loaded_at == EPOCH + 9
    world.settle()
    state = state_of(world, "a")
    assert (state.requests, state.hits, state.loads, state.evictions) == (2, 0, 2, 0)
    assert state.tokens == sum(s.generated for s in first + second) == 41
    assert (state.running, state.waiting, state.last_use) == (0, 0, EPOCH + 9)
    assert state.queue_s == 4.0, "two of the first request's samples waited 2 s each"
    world.run(*world.submit(PROMPT, lora="a", max_new=1))
    assert state_of(world, "a").hits == 1


def test_a_preempted_sequence_has_waited_once() -> None:
    world = World(num_pages=6, max_running=2)
    world.load_now("a", "pa")
    world.submit([1] * 8, lora="a", max_new=9, ignore_eos=True)
    world.submit([2] * 8, lora="a", max_new=9, ignore_eos=True)
    for _ in range(200):
        world.now += 1.0
        world.step()
        while world.acks():
            world.ack()
        if world.state().preemptions:
            break
    assert world.state().preemptions
    before = state_of(world, "a").queue_s
    world.now += 100.0
    world.settle()
    assert state_of(world, "a").queue_s == before


def test_a_state_says_what_the_loader_found() -> None:
    world = World(files={"pa": Adapter(num_pages=3)})
    world.load_now("a", "pa")
    state = state_of(world, "a")
    assert state.modules == ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert (state.revision, state.num_bytes, state.last_use) == ("r0", 300, 0.0)
