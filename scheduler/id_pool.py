"""Numbers that are free or taken: pages, slice-table rows and host pages are handed out here."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(slots=True)
class StepClock:
    """How far the workers' stream is. Steps are numbered from 1 and complete in order.

    `uses` is the logical time by which least recently used things are found.
    """

    planned: int = 0
    completed: int = 0
    uses: int = 0

    def use(self) -> int:
        """The next moment of logical time."""
        self.uses += 1
        return self.uses


class IdPool:
    """The ids 0 … size - 1.

    A freed id is *hot* until the last step planned at that moment has completed: a step in flight may still read or
    write what it stands for. A later step of the same stream may take it at once (`take`); a copy, which runs beside
    the stream, takes only *cool* ids (`take_cool`).
    """

    def __init__(self, size: int, clock: StepClock) -> None:
        self.size = size
        self._clock = clock
        self._cool = list(range(size - 1, -1, -1))
        self._hot: deque[tuple[int, int]] = deque()  # (last step planned when freed, id), steps rising
        self._taken = bytearray(size)

    @property
    def num_free(self) -> int:
        return len(self._cool) + len(self._hot)

    @property
    def num_cool(self) -> int:
        """How many ids no step in flight touches."""
        completed = self._clock.completed
        while self._hot and self._hot[0][0] <= completed:
            self._cool.append(self._hot.popleft()[1])
        return len(self._cool)

    def take(self, count: int) -> list[int]:
        """`count` free ids, hot ones first: the cool ones are kept for copies."""
        assert count <= self.num_free
        ids = [self._hot.pop()[1] if self._hot else self._cool.pop() for _ in range(count)]
        self._mark(ids, 1)
        return ids

    def take_cool(self, count: int) -> list[int]:
        assert count <= self.num_cool
        ids = [self._cool.pop() for _ in range(count)]
        self._mark(ids, 1)
        return ids

    def free(self, ids: list[int]) -> None:
        self._mark(ids, 0)
        planned = self._clock.planned
        if planned <= self._clock.completed:
            self._cool.extend(ids)
        else:
            self._hot.extend((planned, i) for i in ids)

    def free_ids(self) -> list[int]:
        """Every free id, for the ledger's recount."""
        return self._cool + [i for _, i in self._hot]

    def _mark(self, ids: list[int], taken: int) -> None:
        for i in ids:
            assert self._taken[i] != taken, f"id {i} is {'taken' if taken else 'free'} already"
            self._taken[i] = taken
