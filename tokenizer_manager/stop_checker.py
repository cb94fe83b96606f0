"""Finds stop strings in text that arrives in pieces, and holds back what may turn out to be the start of one."""

from __future__ import annotations

from typing import NamedTuple


class StopMatch(NamedTuple):
    """Where a stop string lies in the whole text so far: text[start:end]."""

    stop: str
    start: int
    end: int


class StopChecker:
    """Watches one text for `stops` (none empty).

    The match is the one that completes first; of several completing together, the longest. So the result does not
    depend on how the text was cut into pieces.
    """

    __slots__ = ("_stops", "_tail", "_tail_size", "held", "length")

    def __init__(self, stops: tuple[str, ...]) -> None:
        self._stops = stops
        self._tail_size = max(len(stop) for stop in stops) - 1
        self._tail = ""  # the end of the text: what a match in new text can begin in
        self.length = 0  # of the text fed so far
        self.held = 0  # characters at the end of the text that may be the start of a stop string

    def feed(self, text: str) -> StopMatch | None:
        """Append `text`; the match it completes, if any. After a match the checker is spent."""
        window = self._tail + text
        base = self.length - len(self._tail)
        self.length += len(text)
        found = [
            (start + len(stop), start, stop) for stop in self._stops if (start := window.find(stop)) >= 0
        ]
        if found:
            end, start, stop = min(found)
            return StopMatch(stop, base + start, base + end)
        self._tail = window[-self._tail_size :] if self._tail_size else ""
        self.held = max(_partial_match(self._tail, stop) for stop in self._stops)
        return None


def _partial_match(tail: str, stop: str) -> int:
    """Length of the longest end of `tail` with which `stop` begins, `stop` itself excluded."""
    start = tail.find(stop[0], max(0, len(tail) - len(stop) + 1))
    while start >= 0:
        if stop.startswith(tail[start:]):
            return len(tail) - start
        start = tail.find(stop[0], start + 1)
    return 0
