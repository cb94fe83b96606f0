"""What takes long and can wait until nobody does: the recount of the books, and garbage that has grown old.

With a full cache both take time by the page: for 54,000 pages, those of an 8B model on one GPU of 140 GB, 30 to 100 ms each,
longer than most steps that the device has to go on with. Python would collect all garbage each time a quarter of the
cache's nodes is new, in the middle of the load; and a recount right at the end of a request would hold up a lone user's
next one.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

from manylora.scheduler.scheduler import Scheduler

QUIET_S = 1.0
_NEVER = 10**9


def leave_old_garbage() -> None:
    """Collect what the start left. From now on only young garbage is collected by itself, old garbage in quiet time.

    That loses little: what the scheduler forgets is in no cycle, so it needs no collector (tests/scheduler/test_quiet_time.py).
    """
    gc.collect()
    gc.freeze()
    young, middle, _ = gc.get_threshold()
    gc.set_threshold(young, middle, _NEVER)


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
