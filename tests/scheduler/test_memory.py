"""Who gets pages and slices, and what is evicted for them."""

from __future__ import annotations

from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.memory import Memory, PoolLimits
from manylora.scheduler.version import DeviceCopy, Version


def make_memory(
    num_pages: int, num_slices: int = 4, max_total_tokens: int | None = None
) -> tuple[Memory, StepClock]:
    clock = StepClock()
    limits = PoolLimits(num_pages, 0, num_slices)
    return Memory(limits, page_size=2, max_total_tokens=max_total_tokens, clock=clock), clock


def make_version(number: int, num_pages: int = 1, num_slices: int = 1, *, pinned: bool = False) -> Version:
    return Version(number, f"n{number}", "p", pinned, "d", num_pages, num_slices, max_rank=8)


def make_resident(memory: Memory, version: Version) -> bool:
    taken = memory.take_adapter(version)
    if taken:
        version.device = DeviceCopy.RESIDENT
    return taken


def cache_page(memory: Memory, key: bytes) -> None:
    pages = memory.take_kv(1)
    assert pages is not None
    memory.tree.insert(0, None, key, pages[0])


def test_kv_evicts_cached_prefixes_but_only_if_that_is_enough() -> None:
    memory, _ = make_memory(3)
    cache_page(memory, b"aaaaaaaa")
    cache_page(memory, b"bbbbbbbb")
    assert memory.take_kv(4) is None
    assert memory.tree.num_pages == 2
    assert memory.take_kv(1, spare=3) is None
    assert memory.take_kv(2) is not None
    assert memory.tree.num_pages == 1


def test_the_quota_evicts_prefixes_and_never_adapters() -> None:
    memory, _ = make_memory(8, max_total_tokens=5)
    assert make_resident(memory, make_version(1))
    cache_page(memory, b"aaaaaaaa")
    assert memory.take_kv(3) is None
    assert memory.take_kv(2) is not None
    assert memory.tree.num_pages == 0
    assert list(memory.resident) == [1]


def test_an_adapter_takes_only_what_no_step_in_flight_touches() -> None:
    memory, clock = make_memory(2)
    pages = memory.take_kv(2)
    assert pages is not None
    clock.planned = 1
    memory.free_kv(pages)
    version = make_version(1, num_pages=2)
    assert not memory.take_adapter(version)
    clock.completed = 1
    assert memory.take_adapter(version)


def test_slice_rows_cool_as_pages_do() -> None:
    memory, clock = make_memory(8, num_slices=3)
    first, second = make_version(1, num_slices=2), make_version(2, num_slices=2)
    assert make_resident(memory, first)
    clock.planned = 1
    assert not memory.take_adapter(second)  # `first` is evicted, one of its rows is still hot
    assert not memory.resident
    clock.completed = 1
    assert memory.take_adapter(second)


def test_adapters_in_use_pinned_or_being_copied_are_not_evicted() -> None:
    memory, _ = make_memory(3)
    used, pinned, copying = make_version(1), make_version(2, pinned=True), make_version(3)
    assert make_resident(memory, used)
    assert make_resident(memory, pinned)
    assert memory.take_adapter(copying)
    copying.device = DeviceCopy.COPYING
    used.num_running = 1
    assert memory.num_cached == 0
    assert memory.take_kv(1) is None
    used.num_running = 0
    assert memory.take_kv(1) is not None
    assert sorted(memory.resident) == [2, 3]
