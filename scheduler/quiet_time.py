"""What takes long and can wait until nobody does: the recount of the books, and the collection of garbage.

With a full cache both take time by the page: for 54,000 pages, those of an 8B model on one GPU of 140 GB, 30 to 100 ms each,
longer than most steps that the device has to go on with. A recount right at the end of a request would hold up a lone user's
next one. Python would collect in the middle of the load, and not only old garbage: where as many nodes die as are born, it
sees no reason to look at the young ones until there are tens of thousands.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from manylora.scheduler.scheduler import Scheduler

QUIET_S = 1.0


def leave_garbage() -> None:
    """Collect what the start left. From now on garbage is collected in quiet time alone.

    A busy server may never have that, and loses nothing: what the scheduler forgets is in no cycle, so it needs no collector
    (tests/scheduler/test_quiet_time.py).
    """
    gc.collect()
    gc.freeze()
    gc.disable()


def tidy_up(scheduler: Scheduler) -> None:
    """Raises AssertionError if the books are wrong."""
    scheduler.check()
    gc.collect()


class QuietTime:
    """Tidies up once a scheduler has been idle for `QUIET_S`, once for each time that it was busy."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._litter = True
        self._due: float | None = None  # None: it is busy, or all is tidy

    @property
    def seconds_to_due(self) -> float | None:
        """When `use` is to be called again though nothing happens; None: it need not."""
        return None if self._due is None else max(0.0, self._due - self._clock())

    def use(self, scheduler: Scheduler) -> None:
        """Call it when all else is done. Raises AssertionError if the books are wrong."""
        if not scheduler.idle:
            self._litter, self._due = True, None
        elif self._litter and self._due is None:
            self._due = self._clock() + QUIET_S
        elif self._due is not None and self._clock() >= self._due:
            tidy_up(scheduler)
            self._litter, self._due = False, None
