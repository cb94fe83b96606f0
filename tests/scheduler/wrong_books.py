"""The scheduler's process, whose books are wrong from the start: `python -m tests.scheduler.wrong_books <config file>`."""

from __future__ import annotations

import gc
import sys

from manylora.runtime.child import run_child
from manylora.scheduler import process
from manylora.scheduler.scheduler import Scheduler


def complain(self: Scheduler) -> None:
    raise AssertionError("wrong, while garbage is " + ("collected" if gc.isenabled() else "left"))


if __name__ == "__main__":
    Scheduler.check = complain
    run_child("scheduler", sys.argv[1:], process.main)
