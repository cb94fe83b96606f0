"""What the scheduler measures for others: where pages are, and how long sequences waited."""

from __future__ import annotations

from typing import Any

from manylora.runtime.messages import Start, StepOutput
from tests.scheduler.world import Adapter, World

PROMPT = [1, 2, 3, 4, 5, 6, 8, 9, 10]


def starts_of(world: World) -> list[Start]:
    """Every Start from now on."""
    starts: list[Start] = []
    receive = world.front.on_message

    def record(message: Any, *rest: Any) -> None:
        if isinstance(message, StepOutput):
            starts.extend(message.starts)
        receive(message, *rest)

    world.front.on_message = record  # type: ignore[method-assign]
    return starts


def test_every_page_is_free_or_of_kv_or_of_an_adapter() -> None:
    world = World(files={"a": Adapter(num_pages=3)})
    world.load_now("a", "a")
    world.submit(PROMPT, max_new=6, ignore_eos=True)
    seen: set[tuple[int, int]] = set()
    for turn in range(200):
        if turn == 3:
            world.submit(PROMPT, lora="a", max_new=6, ignore_eos=True)
        state = world.state()
        assert state.pages_free + state.pages_kv + state.pages_adapters == state.pages_total
        assert 0 <= state.pages_kv_cached <= min(state.pages_kv, state.pages_cached)
        assert state.pages_cached - state.pages_kv_cached in (0, state.pages_adapters)
        seen.add((bool(state.pages_kv - state.pages_kv_cached), state.pages_adapters))
        if turn > 3 and world.scheduler.idle:
            break
        world.step()
        while world.acks():
            world.ack()
    assert {
        (True, 0),
        (True, 3),
        (False, 3),
    } <= seen  # KV held without and with the adapter, and all of it cached


def test_the_queue_time_is_from_arrival_to_the_first_step_and_preemption_adds_none() -> None:
    world = World(num_pages=6, max_running=2, radix=False, overlap=False)
    starts = starts_of(world)
    sequences = [world.submit(PROMPT[:4], max_new=12, ignore_eos=True)[0] for _ in range(3)]
    for _ in range(1000):
        if world.scheduler.idle:
            break
        world.step()
        world.now += 1
    assert all(sequence.finish.reason == "length" for sequence in sequences)
    assert world.state().preemptions > 0
    waited = [start.queue_s for start in starts]
    assert waited[:2] == [0, 0]
    assert waited[2] >= 11  # until one of the others had ended


def test_the_queue_time_counts_the_wait_for_a_grammar() -> None:
    world = World()
    starts = starts_of(world)
    world.submit(PROMPT[:4], max_new=2, regex="5")
    world.now += 3
    world.settle()
    assert [start.queue_s for start in starts] == [3]
