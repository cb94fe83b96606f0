"""The one memory of a rank as numbers: pages for KV and adapters, rows of the slice table, and what is evicted for them.

    page   free     hot or cool (`IdPool`)
           cached   a prefix nobody reads, or a resident adapter nobody runs
           held     everything else: KV in use, adapters in use, pinned, or being copied

Cached pages are forgotten least recently used first, whatever they hold; an adapter goes as a whole.
"""

from __future__ import annotations

from dataclasses import dataclass

from manylora.scheduler.id_pool import IdPool, StepClock
from manylora.scheduler.prefix_tree import PrefixTree
from manylora.scheduler.version import DeviceCopy, Version


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """Sizes of the workers' pools: the smallest of all ranks."""

    num_pages: int
    num_host_pages: int
    num_slices: int


class Memory:
    def __init__(
        self, limits: PoolLimits, *, page_size: int, max_total_tokens: int | None, clock: StepClock
    ) -> None:
        self.page_size = page_size
        self.max_kv_pages = limits.num_pages
        if max_total_tokens is not None:
            self.max_kv_pages = min(limits.num_pages, max_total_tokens // page_size)
        self.pages = IdPool(limits.num_pages, clock)
        self.slices = IdPool(limits.num_slices, clock)
        self.tree = PrefixTree(page_size, clock, self.free_kv)
        self.resident: dict[int, Version] = {}  # by version id; with those being copied
        self.num_kv_pages = 0  # the tree's and the sequences' own
        self._clock = clock

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    @property
    def num_cached(self) -> int:
        return self.tree.num_idle + sum(v.num_pages for v in self.resident.values() if v.is_idle)

    # ---- KV -----------------------------------------------------------------------------------------------------

    def take_kv(self, count: int, spare: int = 0) -> list[int] | None:
        """`count` pages, evicting as needed; None, and nothing evicted, unless `spare` more could be had."""
        if self.num_kv_pages + count - self.max_kv_pages > self.tree.num_idle:
            return None
        short = count + spare - self.pages.num_free
        if short > 0 and short > self.num_cached:
            return None
        while self.num_kv_pages + count > self.max_kv_pages:
            self._evict_prefix()
        self._make_free(count)
        self.num_kv_pages += count
        return self.pages.take(count)

    def free_kv(self, pages: list[int]) -> None:
        self.num_kv_pages -= len(pages)
        self.pages.free(pages)

    # ---- adapters -----------------------------------------------------------------------------------------------

    def take_adapter(self, version: Version) -> bool:
        """Give `version` pages and slices to be copied into. False: not now, everything is in use or still hot."""
        if version.num_pages - self.pages.num_free > self.num_cached:
            return False
        idle = [v for v in self.resident.values() if v.is_idle]
        if version.num_slices - self.slices.num_free > sum(v.num_slices for v in idle):
            return False
        idle.sort(key=lambda v: -v.last_use)
        while self.slices.num_free < version.num_slices:
            self._evict_adapter(idle.pop())
        self._make_free(version.num_pages)
        if self.pages.num_cool < version.num_pages or self.slices.num_cool < version.num_slices:
            return False
        version.pages = self.pages.take_cool(version.num_pages)
        version.slices = self.slices.take_cool(version.num_slices)
        version.last_use = self._clock.use()
        self.resident[version.id] = version
        return True

    def free_adapter(self, version: Version) -> None:
        """Take back the pages and slices of a version that no admitted sequence uses."""
        assert not version.num_running
        del self.resident[version.id]
        self.pages.free(version.pages)
        self.slices.free(version.slices)
        version.pages, version.slices = [], []
        version.device = DeviceCopy.NONE

    # ---- eviction -----------------------------------------------------------------------------------------------

    def _make_free(self, count: int) -> None:
        """Evict until `count` pages are free; the caller has made sure that they can be."""
        if self.pages.num_free >= count:
            return
        idle = sorted((v for v in self.resident.values() if v.is_idle), key=lambda v: -v.last_use)
        while self.pages.num_free < count:
            leaf = self.tree.oldest_idle()
            if idle and (leaf is None or idle[-1].last_use < leaf.last_use):
                self._evict_adapter(idle.pop())
            else:
                self._evict_prefix()

    def _evict_adapter(self, version: Version) -> None:
        version.record.evictions += 1
        self.free_adapter(version)

    def _evict_prefix(self) -> None:
        leaf = self.tree.oldest_idle()
        assert leaf is not None
        self.tree.evict(leaf)
