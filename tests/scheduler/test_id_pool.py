"""Ids: free or taken, hot or cool."""

from __future__ import annotations

import pytest

from manylora.scheduler.id_pool import IdPool, StepClock


def test_ids_are_taken_from_zero_and_come_back() -> None:
    pool = IdPool(4, StepClock())
    assert pool.take(3) == [0, 1, 2]
    pool.free([1])
    assert pool.num_free == 2
    assert sorted(pool.take(2)) == [1, 3]
    assert pool.num_free == 0


def test_a_freed_id_stays_hot_until_the_last_planned_step_is_complete() -> None:
    clock = StepClock(planned=7, completed=5)
    pool = IdPool(3, clock)
    taken = pool.take(3)
    pool.free(taken[:1])
    assert (pool.num_free, pool.num_cool) == (1, 0)
    clock.completed = 6
    assert pool.num_cool == 0
    clock.completed = 7
    assert pool.num_cool == 1
    assert pool.take_cool(1) == taken[:1]


def test_a_step_takes_hot_ids_before_cool_ones() -> None:
    clock = StepClock()
    pool = IdPool(4, clock)
    pool.take(2)
    clock.planned = 1
    pool.free([0])
    assert pool.take(1) == [0]
    assert pool.num_cool == 2


def test_an_id_freed_with_nothing_in_flight_is_cool() -> None:
    pool = IdPool(1, StepClock(planned=3, completed=3))
    pool.free(pool.take(1))
    assert pool.num_cool == 1


def test_freeing_twice_is_a_bug() -> None:
    pool = IdPool(2, StepClock())
    ids = pool.take(1)
    pool.free(ids)
    with pytest.raises(AssertionError):
        pool.free(ids)
