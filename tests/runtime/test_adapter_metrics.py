"""Series of single adapters: bounded, and counters that never go down."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from manylora.runtime.adapter_metrics import (
    COUNTS,
    IDLE_S,
    MAX_LABEL_LENGTH,
    MAX_LABELS,
    OTHERS,
    AdapterLabels,
    label_value,
)
from manylora.runtime.messages import AdapterState

TOKENS = COUNTS.index("tokens")


def adapter(name: str, *, tier: str = "host", last_use: float = 0.0, **fields: float) -> AdapterState:
    state = AdapterState(name, "/path", 1, "", False, tier, 8, 5, 0, last_use=last_use)
    return msgspec.structs.replace(state, **fields)


@dataclass
class Names:
    """Adapters that come, work and go, as the scheduler tells of them."""

    now: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    last_use: dict[str, float] = field(default_factory=dict)

    def states(self) -> list[AdapterState]:
        return [
            adapter(name, tokens=count, last_use=self.last_use[name]) for name, count in self.tokens.items()
        ]

    def use(self, name: str, count: int) -> None:
        self.tokens[name] = self.tokens.get(name, 0) + count
        self.last_use[name] = self.now


def test_a_row_tells_what_the_scheduler_told() -> None:
    state = adapter(
        "a", tier="resident", last_use=7.0, running=2, waiting=3, loads=4, evictions=1, hits=6, queue_s=0.5
    )
    row = AdapterLabels().update([state])["a"]
    assert row.tiers == {"disk": 0, "host": 0, "resident": 1}
    assert (row.pages, row.running, row.waiting, row.last_use) == (5, 2, 3, 7.0)
    assert dict(zip(COUNTS, row.counts, strict=True)) == {
        "requests": 0,
        "loads": 4,
        "evictions": 1,
        "hits": 6,
        "queue_s": 0.5,
        "tokens": 0,
    }
    [host] = AdapterLabels().update([adapter("a")]).values()
    assert (host.pages, host.tiers["host"]) == (0, 1)


def test_beyond_the_limit_adapters_are_summed() -> None:
    states = [adapter(f"a{i}", tokens=1, waiting=1, last_use=float(i)) for i in range(250)]
    rows = AdapterLabels().update(states)
    assert len(rows) == MAX_LABELS + 1
    assert set(rows) == {OTHERS} | {f"a{i}" for i in range(150, 250)}
    assert (rows[OTHERS].counts[TOKENS], rows[OTHERS].waiting, rows[OTHERS].tiers["host"]) == (150, 150, 150)


def test_only_who_is_idle_gives_its_series_up() -> None:
    names = Names()
    labels = AdapterLabels(2, lambda: names.now)
    names.use("a", 5)
    names.now = 1
    names.use("b", 5)
    assert set(labels.update(names.states())) == {"a", "b"}
    names.now = IDLE_S
    names.use("c", 5)
    assert set(labels.update(names.states())) == {"a", "b", OTHERS}
    names.now += 0.5
    names.use("c", 2)
    rows = labels.update(names.states())
    assert {label: row.counts[TOKENS] for label, row in rows.items()} == {"b": 5, "c": 2, OTHERS: 5}


def test_an_unloaded_adapter_takes_its_series_along() -> None:
    labels = AdapterLabels()
    labels.update([adapter("a", tokens=9), adapter("b", tokens=1)])
    assert set(labels.update([adapter("b", tokens=1)])) == {"b"}
    assert labels.update([adapter("a", tokens=2), adapter("b", tokens=1)])["a"].counts[TOKENS] == 2


def test_one_that_was_loaded_again_between_two_looks_begins_anew() -> None:
    labels = AdapterLabels(max_labels=0)
    labels.update([adapter("a", tokens=9)])
    assert labels.update([adapter("a", tokens=4)])[OTHERS].counts[TOKENS] == 13


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from("abcdefg"), st.integers(0, 9), st.sampled_from([0.0, 1.0, IDLE_S, 2 * IDLE_S])
        ),
        max_size=40,
    ),
    st.integers(0, 4),
)
def test_no_counter_goes_down_and_no_event_is_lost_or_counted_twice(
    uses: list[tuple[str, int, float]], max_labels: int
) -> None:
    names = Names()
    labels = AdapterLabels(max_labels, lambda: names.now)
    before: dict[str, float] = {}
    increases: Counter[str] = Counter()
    for name, count, pause in uses:
        names.now += pause
        names.use(name, count)
        rows = {label: row.counts[TOKENS] for label, row in labels.update(names.states()).items()}
        assert len(rows) <= max_labels + 1
        assert all(value >= before.get(label, 0) for label, value in rows.items())
        increases["all"] += round(sum(value - before.get(label, 0) for label, value in rows.items()))
        before = rows
    assert increases["all"] == sum(names.tokens.values())


def test_long_names_stay_apart() -> None:
    names = ["x" * 127, "x" * 128, "x" * 129, "x" * 511 + "a", "x" * 511 + "b"]
    values = [label_value(name) for name in names]
    assert len(set(values)) == len(names)
    assert max(map(len, values)) == MAX_LABEL_LENGTH
    assert values[:2] == names[:2]
