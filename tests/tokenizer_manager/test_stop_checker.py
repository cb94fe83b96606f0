"""Stop strings: found wherever the text was cut, and never shown in part."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from manylora.tokenizer_manager.stop_checker import StopChecker, StopMatch

short_text = st.text(alphabet="abc", max_size=20)
stops = st.lists(st.text(alphabet="abc", min_size=1, max_size=4), min_size=1, max_size=4).map(tuple)


def naive_match(text: str, stops: tuple[str, ...]) -> StopMatch | None:
    """The same by definition: the first place where any stop string ends, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return StopMatch(stop, end - len(stop), end)
    return None


def cut(text: str, lengths: list[int]) -> list[str]:
    parts: list[str] = []
    for length in lengths:
        parts.append(text[:length])
        text = text[length:]
    return [*parts, text]


@given(text=short_text, stops=stops, lengths=st.lists(st.integers(0, 5), max_size=12))
def test_match_does_not_depend_on_the_pieces(text: str, stops: tuple[str, ...], lengths: list[int]) -> None:
    checker = StopChecker(stops)
    match = None
    for part in cut(text, lengths):
        match = checker.feed(part)
        if match is not None:
            break
    assert match == naive_match(text, stops)


@given(text=short_text, stops=stops)
def test_held_is_the_longest_beginning_of_a_stop(text: str, stops: tuple[str, ...]) -> None:
    checker = StopChecker(stops)
    for end, char in enumerate(text, start=1):
        if checker.feed(char) is not None:
            return
        so_far = text[:end]
        starts = [size for stop in stops for size in range(len(stop)) if so_far.endswith(stop[:size])]
        assert checker.held == max(starts)


@pytest.mark.parametrize(
    ("parts", "stops", "expected"),
    [
        (["Hello, wor", "ld"], ("world",), StopMatch("world", 7, 12)),
        (["one\n", "\ntwo"], ("\n\n",), StopMatch("\n\n", 3, 5)),
        (["xabcx"], ("abc", "b"), StopMatch("b", 2, 3)),
        (["aab"], ("aab", "ab"), StopMatch("aab", 0, 3)),
        (["日", "本"], ("日本",), StopMatch("日本", 0, 2)),
    ],
)
def test_examples(parts: list[str], stops: tuple[str, ...], expected: StopMatch) -> None:
    checker = StopChecker(stops)
    found = [match for part in parts if (match := checker.feed(part)) is not None]
    assert found == [expected]
