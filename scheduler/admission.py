"""Who enters this step: first come, first served, with backfilling that cannot delay the one it overtakes.

A step runs at most `max_loras_per_batch` distinct adapters. When a waiting adapter finds no place, the running one that
will be done first is marked to *drain*, up to the step at which its running sequences are planned to have ended. Behind
the blocked sequence a sequence of a draining adapter enters only if it will have ended by then or soon after, so that
requests that came together run together; those of other running adapters and of the base model enter freely, since they
do not hold up a place that is being drained. Several blocked adapters drain several places. Whoever is blocked by
memory stops all behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.device_tier import DeviceTier
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import Sequence
from manylora.scheduler.sequence_memory import SequenceMemory
from manylora.scheduler.step import StepDraft
from manylora.scheduler.version import DeviceCopy, Version

DRAIN_GRACE = 4  # a drain may take longer than was planned by one part in so many
BACKFILL_DEPTH = 32  # sequences of one draining adapter looked at in a step


@dataclass(slots=True)
class Drain:
    """`version` is to end its running sequences for `waiter`, whose first sequence came as `arrival`."""

    version: Version
    waiter: Version
    arrival: int
    deadline: int  # step by which its sequences must have ended


class Admission:
    def __init__(
        self,
        roster: Roster,
        adapters: AdapterTable,
        device: DeviceTier,
        memory: SequenceMemory,
        *,
        max_adapters: int,
        chunk_size: int,
    ) -> None:
        self._roster = roster
        self._adapters = adapters
        self._device = device
        self._memory = memory
        self._max_adapters = max_adapters
        self._chunk_size = chunk_size
        self._drains: dict[int, Drain] = {}  # by id of the draining version

    def admit(self, draft: StepDraft, step: int) -> None:
        """Move waiting sequences into the step until budget, slots, memory or the queue end."""
        roster = self._roster
        if not roster.changed or not self._adapters.pins_ready() or not roster.free_slots:
            return
        roster.changed = False
        self._drop_old_drains()
        walk = _Walk(self._max_adapters - roster.num_active)
        for sequence in roster.waiting.walk(walk.closed):
            if draft.budget <= 0 or not roster.free_slots:
                roster.changed = True
                return
            if sequence.group is not None and not sequence.group.may_enter(sequence):
                continue
            if not sequence.may_draw:  # it was preempted while its mask is computed
                continue
            version = sequence.version
            if version is not None and not self._may_run(sequence, version, walk, step):
                if walk.stopped:
                    roster.changed = True
                    return
                continue
            if not self._enter(sequence, draft):
                return

    def _may_run(self, sequence: Sequence, version: Version, walk: _Walk, step: int) -> bool:
        """Whether the sequence's adapter may run in this step; what holds it up is noted in `walk`."""
        if version.num_running:
            if self._spares_drain(sequence, version, step):
                return True
            walk.overlooked[version.id] = overlooked = walk.overlooked.get(version.id, 0) + 1
            if overlooked >= BACKFILL_DEPTH:
                walk.closed.add(version.id)
            return False
        walk.closed.add(version.id)
        if not self._adapters.want(version):
            return False
        if walk.places <= 0:
            self._drain_for(version, sequence.arrival, step)
            return False
        if not self._device.make_resident(version):
            walk.stopped = True
            return False
        walk.places -= 1
        if version.device is not DeviceCopy.RESIDENT:
            return False
        walk.closed.discard(version.id)
        return True

    def _spares_drain(self, sequence: Sequence, version: Version, step: int) -> bool:
        """Whether the sequence leaves a drain of its own running adapter undisturbed."""
        drain = self._drains.get(version.id)
        if drain is None or sequence.arrival < drain.arrival:
            return True
        return step + sequence.steps_left(self._chunk_size) <= drain.deadline

    def _drain_for(self, waiter: Version, arrival: int, step: int) -> None:
        """Reserve a place for a blocked adapter: drain the one that ends first, and copy the weights meanwhile."""
        if any(drain.waiter is waiter for drain in self._drains.values()):
            return
        ends: dict[int, int] = {}
        versions: dict[int, Version] = {}
        for sequence in self._roster.running:
            version = sequence.version
            if version is not None and version.id not in self._drains:
                versions[version.id] = version
                end = step + sequence.steps_left(self._chunk_size)
                ends[version.id] = max(end, ends.get(version.id, 0))
        if ends:
            first = min(ends, key=lambda version_id: ends[version_id])
            deadline = ends[first] + (ends[first] - step) // DRAIN_GRACE
            self._drains[first] = Drain(versions[first], waiter, arrival, deadline)
            self._device.make_resident(waiter)

    def _drop_old_drains(self) -> None:
        """Forget drains that are done, or whose waiter runs or waits no more."""
        waiting = self._roster.waiting
        self._drains = {
            version_id: drain
            for version_id, drain in self._drains.items()
            if drain.version.num_running and not drain.waiter.num_running and waiting.has(drain.waiter.id)
        }

    def _enter(self, sequence: Sequence, draft: StepDraft) -> bool:
        """Give the sequence pages and a slot and plan its first chunk; False if memory is short."""
        roster = self._roster
        roster.claim(sequence.version)
        entered, match = self._memory.enter(sequence, len(roster.running))
        if not entered:
            roster.unclaim(sequence.version)
            return False
        roster.start(sequence)
        for index, page in enumerate(sequence.pages):
            draft.pages += (sequence.slot, index, page)
        if match.tail_len:
            draft.copies += (match.tail_page, sequence.pages[len(match.nodes)])
        if match.tail:
            draft.tails.append(match.tail)
        draft.entered.append(sequence)
        draft.add_chunk(sequence)
        return True


class _Walk:
    """What one pass over the queue has used up."""

    def __init__(self, places: int) -> None:
        self.places = places  # distinct adapters that may still start to run
        self.closed: set[int] = set()  # versions of which no further sequence can enter
        self.overlooked: dict[int, int] = {}  # sequences passed over, by draining version
        self.stopped = False  # memory is short for an adapter: nobody behind may take it
