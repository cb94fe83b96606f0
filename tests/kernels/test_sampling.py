"""Sampling ops: the generator against published vectors, filters against plain loops, draws against frequencies."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from manylora.kernels.sampling import (
    add_biases,
    apply_penalties,
    forbid_tokens,
    keep_allowed,
    philox,
    rows_finite,
    sample,
    sample_greedy,
    uniform,
)

torch.set_num_threads(1)


# Random123's known-answer vectors for philox4x32-10: counter, key, output.
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], expected: list[int]) -> None:
    blocks = philox(torch.tensor(counter).repeat(3, 1).T, torch.tensor(key).repeat(3, 1).T)
    assert blocks.T.tolist() == [expected] * 3


def test_uniform_is_a_function_of_each_argument() -> None:
    base = (7, 11, 0, 100)
    variants = [base, (8, 11, 0, 100), (7, 12, 0, 100), (7, 11, 1, 100), (7, 11, 0, 101)]
    columns = [torch.tensor(column) for column in zip(*variants, strict=True)]
    drawn = uniform(*columns)
    assert drawn.dtype == torch.float32
    assert len(set(drawn.tolist())) == len(variants)
    alone = uniform(*(torch.tensor([value]) for value in base))
    assert alone.item() == drawn[0].item()


def test_uniform_takes_signed_seed_words() -> None:
    index = torch.zeros(1, dtype=torch.int64)
    signed = uniform(torch.tensor([-1]), torch.tensor([-2]), index, index)
    unsigned = uniform(torch.tensor([2**32 - 1]), torch.tensor([2**32 - 2]), index, index)
    assert signed.item() == unsigned.item()


def test_uniform_is_uniform() -> None:
    positions = torch.arange(100_000)
    same = torch.zeros_like(positions)
    drawn = uniform(same + 3, same, same, positions)
    assert drawn.min() >= 0
    assert drawn.max() < 1
    counts = torch.histc(drawn, bins=20, min=0, max=1)
    assert ((counts - 5000).abs() < 5 * math.sqrt(5000)).all()


def _sample(logits: torch.Tensor, uniforms: torch.Tensor, **columns: float) -> list[int]:
    rows = logits.shape[0]
    values = {"temperature": 1.0, "top_k": logits.shape[1], "top_p": 1.0, "min_p": 0.0} | columns
    return sample(
        logits,
        torch.full((rows,), values["temperature"], dtype=torch.float32),
        torch.full((rows,), int(values["top_k"])),
        torch.full((rows,), values["top_p"], dtype=torch.float32),
        torch.full((rows,), values["min_p"], dtype=torch.float32),
        uniforms,
    ).tolist()


def _kept(probs: list[float], top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters' definition, one token at a time."""
    order = sorted(range(len(probs)), key=lambda i: (-probs[i], i))
    kept: set[int] = set()
    before = 0.0
    for rank, token in enumerate(order):
        in_nucleus = top_p >= 1 or before < top_p
        if rank < top_k and in_nucleus and probs[token] >= min_p * probs[order[0]]:
            kept.add(token)
        before += probs[token]
    return kept


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize(
    ("top_k", "top_p", "min_p"),
    [(40, 1.0, 0.0), (5, 1.0, 0.0), (40, 0.6, 0.0), (40, 1.0, 0.2), (7, 0.8, 0.1)],
)
def test_filters_keep_exactly_the_defined_tokens(
    top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(1))
    uniforms = torch.arange(0, 1, 2.0**-12)
    drawn = _sample(
        logits.expand(len(uniforms), -1).contiguous(),
        uniforms,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
    )
    probs = torch.softmax(logits / temperature, -1).tolist()
    kept = _kept(probs, top_k, top_p, min_p)
    assert set(drawn) <= kept
    mass = sum(probs[token] for token in kept)
    for token in kept:  # the stratified uniforms give every kept token its share, to one stratum each side
        assert abs(drawn.count(token) - len(uniforms) * probs[token] / mass) <= 2


def test_rows_are_independent() -> None:
    generator = torch.Generator().manual_seed(2)
    logits, uniforms = torch.randn(16, 100, generator=generator), torch.rand(16, generator=generator)
    together = _sample(logits, uniforms, top_p=0.9)
    alone = [_sample(logits[i : i + 1], uniforms[i : i + 1], top_p=0.9)[0] for i in range(16)]
    assert together == alone


def test_zero_temperature_is_greedy_and_ties_go_to_the_lowest_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0]])
    assert _sample(logits, torch.tensor([0.99, 0.99]), temperature=0.0) == [1, 0]
    assert sample_greedy(logits).tolist() == [1, 0]


def test_each_token_owns_the_half_open_interval_of_its_mass() -> None:
    logits = torch.tensor([[0.0, 0.0]]).repeat(3, 1)
    assert _sample(logits, torch.tensor([0.0, 0.5 - 2.0**-24, 0.5])) == [0, 0, 1]


def test_extreme_uniforms_stay_inside_what_is_kept() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 1.0, -torch.inf, -torch.inf]]).repeat(2, 1)
    assert _sample(logits, torch.tensor([0.0, 1 - 2.0**-24])) == [0, 2]


def test_penalties_match_their_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(3, 12, generator=generator)
    counts = torch.randint(0, 3, (3, 12), generator=generator, dtype=torch.int32)
    in_prompt = torch.rand(3, 12, generator=generator) < 0.4
    frequency, presence, repetition = (
        torch.tensor([0.5, 0.0, -1.0]),
        torch.tensor([0.0, 0.25, 1.0]),
        torch.tensor([1.5, 1.0, 0.5]),
    )
    expected = logits.clone()
    for row in range(3):
        for token in range(12):
            value, count = float(logits[row, token]), int(counts[row, token])
            if count or in_prompt[row, token]:
                value = value / float(repetition[row]) if value > 0 else value * float(repetition[row])
            value -= float(frequency[row]) * count + float(presence[row]) * (count > 0)
            expected[row, token] = value
    apply_penalties(logits, counts, in_prompt, frequency, presence, repetition)
    torch.testing.assert_close(logits, expected)


def test_forbid_tokens_leaves_inactive_rows_and_padding_alone() -> None:
    logits = torch.zeros(2, 4)
    ids = torch.tensor([[0, 2, -1, -1], [1, -1, -1, -1]])
    forbid_tokens(logits, ids, torch.tensor([True, False]))
    assert logits.tolist() == [[-math.inf, 0, -math.inf, 0], [0, 0, 0, 0]]


def test_rows_finite_and_sampling_survives_what_is_not() -> None:
    logits = torch.zeros(4, 6)
    logits[1, 3] = torch.nan
    logits[2, 0] = torch.inf
    logits[3, 5] = -torch.inf
    assert rows_finite(logits).tolist() == [True, False, False, False]
    assert all(0 <= token < 6 for token in _sample(logits, torch.full((4,), 0.5), top_p=0.9))


@settings(max_examples=150, deadline=None)
@given(data=st.data(), vocab=st.integers(1, 140), num_rows=st.integers(1, 5))
def test_a_mask_keeps_exactly_what_it_allows(data: st.DataObject, vocab: int, num_rows: int) -> None:
    """Of any vocabulary, a whole number of words or not; bits past it mean nothing, rows without a mask keep all."""
    masked = data.draw(st.lists(st.integers(0, num_rows - 1), min_size=1, max_size=num_rows, unique=True))
    num_words = -(-vocab // 32)
    word = st.integers(-(2**31), 2**31 - 1)
    words = [data.draw(st.lists(word, min_size=num_words, max_size=num_words)) for _ in masked]
    logits = torch.randn(num_rows, vocab)
    expected = logits.clone()
    for row, mask in zip(masked, words, strict=True):
        for token in range(vocab):
            if not mask[token // 32] >> (token % 32) & 1:
                expected[row, token] = -torch.inf
    keep_allowed(logits, torch.tensor(masked), torch.tensor(words, dtype=torch.int32))
    assert torch.equal(logits, expected)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), vocab=st.integers(1, 50), num_rows=st.integers(1, 5))
def test_biases_are_added_where_they_belong(data: st.DataObject, vocab: int, num_rows: int) -> None:
    """Entries past a row's count are leftovers, which may name tokens that are biased, or any other."""
    width = 8
    ids = torch.randint(vocab, (num_rows, width), generator=torch.Generator().manual_seed(vocab))
    values = torch.full((num_rows, width), 1000.0)
    counts: list[int] = []
    logits = torch.randn(num_rows, vocab)
    expected = logits.clone()
    for row in range(num_rows):
        biases = data.draw(
            st.dictionaries(st.integers(0, vocab - 1), st.floats(-100, 100, width=32), max_size=width)
        )
        counts.append(len(biases))
        for place, (token, bias) in enumerate(biases.items()):
            ids[row, place], values[row, place] = token, bias
            expected[row, token] += bias
    add_biases(logits, ids, values, torch.tensor(counts))
    assert torch.equal(logits, expected)
