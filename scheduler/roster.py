"""Every live sequence: those that wait, in order of arrival and by adapter, and those that run, each in its slot."""

from __future__ import annotations

import heapq
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.sequence import Phase, Sequence
from manylora.scheduler.sequence_memory import SequenceMemory
from manylora.scheduler.version import Version


class WaitQueue:
    """Waiting sequences, one list per adapter version, each in order of arrival."""

    def __init__(self) -> None:
        self._lists: dict[int, list[Sequence]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def push(self, sequence: Sequence) -> None:
        waiting = self._lists.setdefault(sequence.version_id, [])
        waiting.insert(bisect_left(waiting, sequence.arrival, key=_arrival), sequence)
        self._count += 1

    def remove(self, sequence: Sequence) -> None:
        waiting = self._lists[sequence.version_id]
        del waiting[bisect_left(waiting, sequence.arrival, key=_arrival)]
        self._count -= 1
        if not waiting:
            del self._lists[sequence.version_id]

    def has(self, version_id: int) -> bool:
        return version_id in self._lists

    def walk(self, closed: set[int]) -> Iterator[Sequence]:
        """All in order of arrival, but no more of a version once the caller has put it into `closed`.

        The one just yielded may be removed; nothing else may change meanwhile.
        """
        heads = [(waiting[0].arrival, waiting, 0) for waiting in self._lists.values()]
        heapq.heapify(heads)
        while heads:
            _, waiting, index = heads[0]
            sequence = waiting[index]
            length = len(waiting)
            yield sequence
            index += 1 - (length - len(waiting))
            if index < len(waiting) and sequence.version_id not in closed:
                heapq.heapreplace(heads, (waiting[index].arrival, waiting, index))
            else:
                heapq.heappop(heads)


class Roster:
    """The one place where a lease is taken (`add`) and released (`end`).

    `changed` says that something happened that may let a waiting sequence in. `clock`: seconds, of what it notes of times.
    """

    def __init__(
        self,
        num_slots: int,
        memory: SequenceMemory,
        adapters: AdapterTable,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.live: dict[int, Sequence] = {}  # by handle
        self.waiting = WaitQueue()
        self.running: list[Sequence] = []  # in order of arrival
        self.num_active = 0  # versions that run; the base model is free
        self.changed = False
        self.preemptions = 0
        self.num_slots = num_slots
        self.free_slots = list(range(num_slots - 1, -1, -1))
        self._memory = memory
        self._adapters = adapters
        self._clock = clock

    def add(self, sequence: Sequence, version: Version | None, arrived_at: float) -> None:
        """Accept a sequence, which has waited since `arrived_at` on our clock."""
        if version is not None:
            sequence.version, sequence.version_id = version, version.id
            self._adapters.lease(version)
        assert sequence.handle not in self.live
        sequence.arrived_at = arrived_at
        self.live[sequence.handle] = sequence
        self.waiting.push(sequence)
        self.changed = True

    def start(self, sequence: Sequence) -> None:
        """From waiting to running; its version has been claimed (`claim`)."""
        self.waiting.remove(sequence)
        sequence.phase = Phase.RUNNING
        if sequence.queue_s < 0:
            sequence.queue_s = self._clock() - sequence.arrived_at
            if sequence.version is not None:
                sequence.version.record.queue_s += sequence.queue_s
        sequence.slot = self.free_slots.pop()
        self.running.insert(bisect_left(self.running, sequence.arrival, key=_arrival), sequence)

    def claim(self, version: Version | None) -> None:
        """Keep a version resident for one more running sequence."""
        if version is not None:
            self.num_active += version.num_running == 0
            version.num_running += 1

    def unclaim(self, version: Version | None) -> None:
        if version is not None:
            version.num_running -= 1
            self.num_active -= version.num_running == 0
            self._adapters.touch(version)

    def preempt(self, sequence: Sequence) -> None:
        """Back to waiting: its pages are needed; what it knows is computed again."""
        self._stop(sequence, trusted=True)
        sequence.rewind()
        self.waiting.push(sequence)
        self.preemptions += 1
        self.changed = True

    def end(self, sequence: Sequence, *, trusted: bool = True) -> None:
        """The end of a sequence, whatever the reason. `trusted`: its KV may be reused."""
        if sequence.phase is Phase.RUNNING:
            self._stop(sequence, trusted=trusted)
        else:
            self.waiting.remove(sequence)
        sequence.phase = Phase.ENDED
        sequence.generation += 1
        del self.live[sequence.handle]
        if (group := sequence.group) is not None:
            group.members.remove(sequence)
            if not group.members and group.private_namespace is not None:
                self._memory.drop_namespace(group.private_namespace)
        if sequence.version is not None:
            sequence.version.record.ended_tokens += sequence.num_generated
            self._adapters.release(sequence.version)
        self.changed = True

    def _stop(self, sequence: Sequence, *, trusted: bool) -> None:
        self._memory.leave(sequence, trusted=trusted)
        self.free_slots.append(sequence.slot)
        del self.running[bisect_left(self.running, sequence.arrival, key=_arrival)]
        self.unclaim(sequence.version)


def _arrival(sequence: Sequence) -> int:
    return sequence.arrival
