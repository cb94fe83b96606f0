"""The books: what `GetState` tells, and a recount from scratch that must give the same."""

from __future__ import annotations

from collections import Counter

from manylora.runtime.messages import NO_VERSION, State
from manylora.scheduler.adapter_record import AdapterRecord
from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.grammar_desk import GrammarDesk
from manylora.scheduler.host_tier import HostTier
from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.memory import Memory
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import Phase
from manylora.scheduler.version import DeviceCopy


class Ledger:
    def __init__(
        self,
        roster: Roster,
        adapters: AdapterTable,
        memory: Memory,
        host: HostTier,
        clock: StepClock,
        grammars: GrammarDesk,
    ) -> None:
        self._roster = roster
        self._adapters = adapters
        self._memory = memory
        self._host = host
        self._clock = clock
        self._grammars = grammars

    def state(self, call: int) -> State:
        memory, roster, adapters = self._memory, self._roster, self._adapters
        free, cached = memory.pages.num_free, memory.num_cached
        return State(
            call,
            running=len(roster.running),
            waiting=len(roster.waiting),
            leases=sum(v.leases for v in adapters.versions.values()),
            pages_total=memory.pages.size,
            pages_free=free,
            pages_cached=cached,
            pages_held=memory.pages.size - free - cached,
            host_pages_total=self._host.pool.size,
            host_pages_free=self._host.pool.num_free,
            slots_free=len(roster.free_slots),
            slices_free=memory.slices.num_free,
            live_versions=len(adapters.versions),
            steps=self._clock.completed,
            preemptions=roster.preemptions,
            adapters=adapters.teller.states(),
            pages_kv=memory.num_kv_pages,
            pages_kv_cached=memory.tree.num_idle,
            pages_adapters=sum(len(v.pages) for v in memory.resident.values()),
        )

    def check(self) -> None:
        """Every page, slice, host page, slot and lease has exactly one owner; every counter is the recounted one."""
        self._check_pages()
        self._check_sequences()
        self._check_versions()

    def _check_pages(self) -> None:
        memory, roster = self._memory, self._roster
        nodes = list(memory.tree.nodes())
        own_pages = [page for s in roster.running for page in s.pages[len(s.nodes) :]]
        owned = memory.pages.free_ids() + [node.page for node in nodes] + own_pages
        for version in memory.resident.values():
            owned += version.pages
        _check_each_once(owned, memory.pages.size, "page")
        assert memory.tree.num_pages == len(nodes)
        assert memory.num_kv_pages == len(nodes) + len(own_pages) <= memory.max_kv_pages
        refs = Counter(id(node) for s in roster.running for node in s.nodes)
        locked = {id(node): node.refs for node in nodes if node.refs}
        assert locked == refs, "a lock without a running sequence"
        idle = len(nodes) - len(locked)
        idle_adapters = sum(len(v.pages) for v in memory.resident.values() if v.is_idle)
        assert memory.tree.num_idle == idle
        assert memory.num_cached == idle + idle_adapters

    def _check_sequences(self) -> None:
        roster, page_size = self._roster, self._memory.page_size
        running = [s for s in roster.live.values() if s.phase is Phase.RUNNING]
        assert sorted(running, key=lambda s: s.arrival) == roster.running
        assert len(roster.live) == len(running) + len(roster.waiting)
        _check_each_once(roster.free_slots + [s.slot for s in running], roster.num_slots, "slot")
        for s in running:
            assert s.capacity == len(s.pages) * page_size >= s.num_planned
            assert [node.page for node in s.nodes] == s.pages[: len(s.nodes)]
        for s in roster.live.values():
            assert s.phase is Phase.RUNNING or not (s.pages or s.nodes)

    def _check_versions(self) -> None:
        memory, host, versions = self._memory, self._host, self._adapters.versions
        leases = Counter(s.version_id for s in self._roster.live.values() if s.version)
        active = Counter(s.version_id for s in self._roster.running if s.version)
        assert self._roster.num_active == len(active)
        for version in versions.values():
            assert version.leases == leases[version.id]
            assert version.num_running == active[version.id]
            assert not version.num_running or version.device is DeviceCopy.RESIDENT
            assert (version.device is not DeviceCopy.NONE) == (version.id in memory.resident)
        assert set(leases) <= set(versions), "a lease on a dead version"
        named_spaces = {namespace for namespace in memory.tree.namespaces() if namespace > NO_VERSION}
        assert named_spaces <= set(versions), "prefixes of a dead version"
        slices, host_pages = memory.slices.free_ids(), host.pool.free_ids()
        for version in versions.values():
            slices += version.slices
            host_pages += version.host_pages
        _check_each_once(slices, memory.slices.size, "slice")
        _check_each_once(host_pages, host.pool.size, "host page")
        assert all(versions[v.id] is v for v in self._adapters.names.values())
        of_record: Counter[AdapterRecord] = Counter()
        for version in versions.values():
            of_record[version.record] += version.leases
        assert all(record.leases == count for record, count in of_record.items())
        awaited = Counter(self._grammars.kept())
        assert self._adapters.awaited == awaited
        assert all(v.record.awaited == awaited[name] for name, v in self._adapters.names.items())
        due = self._adapters.unloads.due
        for name, version in self._adapters.names.items():
            expires_at = version.record.expires_at
            assert expires_at is None or due <= expires_at or name in self._adapters.loads
        assert set(map(id, self._adapters.pinned)) == {id(v) for v in versions.values() if v.pinned}


def _check_each_once(owned: list[int], size: int, what: str) -> None:
    """Raise unless `owned`, what all owners hold together, is every id below `size` once."""
    if len(owned) == size and set(owned) == set(range(size)):
        return
    counts = Counter(owned)
    wrong = [i for i in range(size) if counts[i] != 1]
    raise AssertionError(f"{what}s without exactly one owner: {wrong[:10]}; {len(owned)} of {size} are owned")
