"""Who waits how long, counted in steps."""

from __future__ import annotations

from tests.scheduler.fake_front import Expected
from tests.scheduler.world import World


def steps_until(world: World, sequence: Expected, limit: int = 2000) -> int:
    """Steps until `sequence` ends, while a request for `hot` arrives in every one of them."""
    for count in range(limit):
        if sequence.ended:
            return count
        world.submit([count % 7, 2], lora=f"hot{count % 2}", max_new=10, ignore_eos=True)
        world.step()
        while world.acks():
            world.ack()
    raise AssertionError("starved")


def busy_world(max_loras: int) -> World:
    world = World(num_pages=200, max_loras=max_loras, max_running=8, chunk=32)
    for name in ("hot0", "hot1", "cold"):
        world.load_now(name, f"p-{name}")
    for i in range(8):
        world.submit([i, 1], lora=f"hot{i % min(2, max_loras)}", max_new=10, ignore_eos=True)
    return world


def test_a_waiting_adapter_gets_its_turn_whatever_the_others_load() -> None:
    for max_loras in (1, 2):
        world = busy_world(max_loras)
        for _ in range(4):
            world.step()
            while world.acks():
                world.ack()
        (cold,) = world.submit([5, 5], lora="cold", max_new=5, ignore_eos=True)
        # Ahead of it: 10 steps of the running ones (for one place, those of both); then its own 5; and the overlap.
        ahead = 10 * (3 - max_loras)
        assert steps_until(world, cold) <= 2 * ahead + 5 + 4


def test_nobody_is_overtaken_for_ever_for_want_of_memory() -> None:
    world = World(num_pages=16, max_running=8, chunk=64)
    for i in range(4):
        world.submit([i, 1, 2, 3, 4], max_new=7, ignore_eos=True)
    world.step()
    (large,) = world.submit([9] * 50, max_new=4, ignore_eos=True)
    for count in range(60):
        if large.ended:
            break
        world.submit([count % 7, 2], max_new=6, ignore_eos=True)
        world.step()
    assert large.finish.reason == "length"


def test_what_ends_before_the_drain_may_still_enter() -> None:
    world = World(num_pages=100, max_loras=1, max_running=8, chunk=32, overlap=False)
    for name in ("a", "b"):
        world.load_now(name, f"p-{name}")
    (long,) = world.submit([1], lora="a", max_new=20, ignore_eos=True)
    while not world.worker.flights:
        world.schedule()
        while world.acks():
            world.ack()
    world.complete_step()
    (blocked,) = world.submit([2], lora="b", max_new=3, ignore_eos=True)
    (short,) = world.submit([3], lora="a", max_new=5, ignore_eos=True)
    (too_long,) = world.submit([4], lora="a", max_new=40, ignore_eos=True)
    while not long.ended:
        world.step()
        while world.acks():
            world.ack()
    assert short.ended
    assert not blocked.started
    assert not too_long.started
    world.settle()
    assert blocked.version == 2


def test_requests_that_come_together_run_together() -> None:
    """An adapter that drains for others takes along what has just begun to wait, not what comes later."""
    world = World(num_pages=200, max_loras=2, max_running=32, chunk=16, overlap=False)
    for name in ("a", "b", "c", "d"):
        world.load_now(name, f"p-{name}")
    made = [
        world.submit([i], lora=name, max_new=20, ignore_eos=True)[0]
        for i, name in enumerate([*"abcd", *"aaaaaaabbbbbbb"])
    ]
    while not made[0].started:
        world.step()
        while world.acks():
            world.ack()
    for _ in range(4):
        world.step()
    running = [sequence for sequence in made if sequence.started]
    assert running == [made[0], made[1], *made[4:]]
    for _ in range(6):
        world.step()
    (late,) = world.submit([9], lora="a", max_new=20, ignore_eos=True)
    while not made[0].ended:
        world.step()
    assert not late.started


def test_several_adapters_in_turn_share_one_place() -> None:
    world = World(num_pages=100, max_loras=1, max_running=8, chunk=32, num_host_pages=16)
    names = [f"n{i}" for i in range(5)]
    for name in names:
        world.load_now(name, f"p-{name}")
    made = [world.submit([i], lora=name, max_new=4, ignore_eos=True)[0] for i in range(3) for name in names]
    world.settle()
    assert all(sequence.finish.reason == "length" for sequence in made)
