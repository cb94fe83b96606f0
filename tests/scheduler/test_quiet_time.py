"""Tidying up is done when nothing has run for a while, and what waits for that is not lost by waiting."""

from __future__ import annotations

import gc
from collections import Counter

import pytest

from manylora.scheduler.quiet_time import QUIET_S, QuietTime
from tests.scheduler import fake_grammar
from tests.scheduler.world import World


class Watched:
    """A quiet time of a world's scheduler by its clock; how often it tidied up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.world = World()
        self.quiet_time = QuietTime(lambda: self.world.now)
        self.done: list[str] = []
        check = self.world.scheduler.check
        monkeypatch.setattr(self.world.scheduler, "check", lambda: (check(), self.done.append("recount")))
        monkeypatch.setattr(gc, "collect", lambda: self.done.append("garbage"))

    def use_after(self, seconds: float) -> list[str]:
        self.world.now += seconds
        self.quiet_time.use(self.world.scheduler)
        done, self.done[:] = list(self.done), []
        return done


def test_it_tidies_up_once_after_a_quiet_second(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    assert watched.use_after(5.0) == []
    assert watched.quiet_time.seconds_to_due == QUIET_S
    assert watched.use_after(QUIET_S / 2) == []  # somebody asked for the state
    assert watched.quiet_time.seconds_to_due == QUIET_S / 2
    assert watched.use_after(QUIET_S / 2) == ["recount", "garbage"]
    assert watched.quiet_time.seconds_to_due is None
    for _ in range(3):
        assert watched.use_after(10.0) == []


def test_a_request_begins_the_second_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.use_after(0.0)
    watched.world.submit([1, 2, 3])
    assert watched.use_after(QUIET_S) == []
    assert watched.quiet_time.seconds_to_due is None
    watched.world.settle()
    watched.done.clear()  # `settle` recounts too
    assert watched.use_after(0.0) == []
    assert watched.use_after(QUIET_S) == ["recount", "garbage"]


def test_wrong_books_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched(monkeypatch)
    watched.world.scheduler._memory.num_kv_pages += 1  # pyright: ignore[reportPrivateUsage]
    watched.use_after(0.0)
    with pytest.raises(AssertionError):
        watched.use_after(QUIET_S)


def test_what_the_scheduler_forgets_waits_for_no_collector() -> None:
    """Garbage is collected in quiet time alone, which a busy server may never have."""
    gc.collect()
    gc.disable()
    try:
        world = _live()
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        ours = Counter(type(thing).__qualname__ for thing in gc.garbage if _is_ours(thing))
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert not ours
    assert world.scheduler.idle  # it lived to the end of the count


def _is_ours(thing: object) -> bool:
    return type(thing).__module__.startswith("manylora.")


def _live() -> World:
    """A scheduler's life with a little of everything; the world is returned so that it is no garbage itself."""
    world = World(num_pages=30)
    for edition, name in enumerate("abc"):
        world.load_now(name, f"p{edition}")
    for round_ in range(8):
        for lora in (None, "a", "b", "c"):
            world.submit([1, 2, 3, 4, 5, round_], lora=lora, max_new=6, n=2, frequency_penalty=0.5)
            world.submit([1, 2, 3, 4, round_], lora=lora, regex="b9", num_top=2, logprob_start_len=0)
            world.submit([7, 7], lora=lora, regex=f"{fake_grammar.BAD}1")
        world.abort(*list(world.sequences.values())[-4:-2])
        world.settle()
        world.unload("b")
        world.load_now("b", "p1", replace=False)
        world.load_now("a", "p0", replace=True)
    world.assert_nothing_left()
    return world
