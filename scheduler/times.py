"""The two clocks of the scheduler: one that only goes forward, to measure with, and the world's, to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Times:
    """now: seconds since some moment, never back; since_1970: seconds of the world's clock."""

    now: Callable[[], float]
    since_1970: Callable[[], float]
