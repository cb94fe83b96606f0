"""What is published of single adapters: few enough to be kept for months, and counters that never go down.

A server may know thousands of adapters, a Prometheus may not. At most `MAX_LABELS` adapters have a label value of their
own, the others are summed under `OTHERS`. Who has one keeps it until the adapter is unloaded, or has been idle for
`IDLE_S` while a busier one has none: else adapters that take turns would make a new series at every scrape.

What was counted before an adapter changed sides stays where it was counted, so both sides only go up. An adapter that is
unloaded takes its series with it; one that comes back begins at zero, which `rate()` takes for a restart.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence

from manylora.runtime.messages import AdapterState

MAX_LABELS = 100
MAX_LABEL_LENGTH = 128  # characters
IDLE_S = 600.0
OTHERS = " others"  # no adapter's name begins with a blank

COUNTS = (
    "requests",
    "loads",
    "evictions",
    "hits",
    "queue_s",
    "tokens",
)  # fields of AdapterState that only go up
TIERS: tuple[str, ...] = ("disk", "host", "resident")


class AdapterRow:
    """All adapters under one label value. `tiers`: how many are in each; `counts`: in the order of COUNTS."""

    __slots__ = ("counts", "last_use", "pages", "running", "tiers", "waiting")

    def __init__(self) -> None:
        self.counts: list[float] = [0] * len(COUNTS)
        self.reset()

    def reset(self) -> None:
        """Forget what is true only now."""
        self.tiers = dict.fromkeys(TIERS, 0)
        self.pages = self.running = self.waiting = 0
        self.last_use = 0.0

    def add(self, state: AdapterState, counts: Sequence[float], before: Sequence[float]) -> None:
        """One adapter, whose counts were `before` when it was last seen."""
        for index, (now, then) in enumerate(zip(counts, before, strict=True)):
            self.counts[index] += now - then
        self.tiers[state.tier] += 1
        self.pages += state.num_pages if state.tier == "resident" else 0
        self.running += state.running
        self.waiting += state.waiting
        self.last_use = max(self.last_use, state.last_use)


class AdapterLabels:
    """Rows by label value. `clock`: seconds since 1970, as `AdapterState.last_use`."""

    def __init__(self, max_labels: int = MAX_LABELS, clock: Callable[[], float] = time.time) -> None:
        self._max_labels = max_labels
        self._clock = clock
        self._own: set[str] = set()  # names with a label value of their own
        self._rows: dict[str, AdapterRow] = {}
        self._seen: dict[str, tuple[float, ...]] = {}  # name -> its counts at the last update

    def update(self, adapters: Iterable[AdapterState]) -> dict[str, AdapterRow]:
        """The rows now, `OTHERS` among them once it was needed."""
        registered = {state.lora_name: state for state in adapters}
        self._choose(registered)
        own = {label_value(name) for name in self._own}
        self._rows = {label: row for label, row in self._rows.items() if label in own or label == OTHERS}
        for row in self._rows.values():
            row.reset()
        seen = self._seen
        self._seen = {}
        for name, state in registered.items():
            counts = tuple(getattr(state, field) for field in COUNTS)
            before = seen.get(name, (0,) * len(counts))
            if any(now < then for now, then in zip(counts, before, strict=True)):
                before = (0,) * len(counts)  # another adapter of that name
            label = label_value(name) if name in self._own else OTHERS
            self._rows.setdefault(label, AdapterRow()).add(state, counts, before)
            self._seen[name] = counts
        return self._rows

    def _choose(self, registered: dict[str, AdapterState]) -> None:
        """Who has a label value of its own from now on."""
        self._own &= registered.keys()
        newcomers = sorted(registered.keys() - self._own, key=lambda name: -registered[name].last_use)
        room = self._max_labels - len(self._own)
        self._own.update(newcomers[:room])
        if not (newcomers := newcomers[room:]):
            return
        idle_since = self._clock() - IDLE_S
        idle = sorted(
            (name for name in self._own if _idle(registered[name], idle_since)),
            key=lambda name: registered[name].last_use,
        )
        for newcomer, leaver in zip(newcomers, idle, strict=False):
            if registered[newcomer].last_use <= registered[leaver].last_use:
                return
            self._own.remove(leaver)
            self._own.add(newcomer)


def label_value(name: str) -> str:
    """The name; of a long one its beginning and a digest, so that two long ones stay two."""
    if len(name) <= MAX_LABEL_LENGTH:
        return name
    digest = hashlib.sha256(name.encode()).hexdigest()[:12]
    return f"{name[: MAX_LABEL_LENGTH - len(digest) - 1]}~{digest}"


def _idle(state: AdapterState, since: float) -> bool:
    return not (state.running or state.waiting) and state.last_use < since
