"""Sampling in Triton against the references: the same token for the same uniform number, ties included."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.sampling import sample_reference, uniform_reference
from manylora.kernels.sampling_triton import sample, uniform
from tests.kernels.sampling_cases import sampling_case

torch.set_num_threads(1)


@pytest.mark.parametrize(("num_rows", "vocab"), [(48, 100), (36, 4096), (24, 9001), (2, 1)])
def test_the_same_draws(num_rows: int, vocab: int) -> None:
    logits, arguments = sampling_case(num_rows, vocab)
    assert sample(logits, *arguments).tolist() == sample_reference(logits, *arguments).tolist()


def test_ties_at_the_cut_are_kept_by_id() -> None:
    logits = torch.zeros(1, 300).expand(8, -1).contiguous()
    logits[:, 250] = 2.0
    ones = torch.ones(8)
    uniforms = torch.linspace(0, 0.999, 8)
    drawn = sample(logits, ones, torch.full((8,), 4), ones, 0 * ones, uniforms)
    assert set(drawn.tolist()) == {0, 1, 2, 250}
    assert drawn.tolist() == sorted(drawn.tolist())


@pytest.mark.filterwarnings(
    "ignore:invalid value:RuntimeWarning"
)  # numpy, which the interpreter computes with
def test_rows_that_are_not_finite_end_with_some_token() -> None:
    logits = torch.randn(6, 200)
    logits[0, 3] = torch.nan
    logits[1, 7] = torch.inf
    logits[2] = torch.nan
    logits[3] = -torch.inf
    logits[4, 5:9] = torch.inf
    ones = torch.ones(6)
    drawn = sample(logits, ones, torch.full((6,), 9), 0.9 * ones, 0 * ones, 0.5 * ones)
    assert all(0 <= token < 200 for token in drawn.tolist())


def test_uniform() -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(-(2**31), 2**31, (300, 2), generator=generator)
    low, high = words.unbind(1)
    index, position = torch.arange(300) % 3, torch.arange(300) * 17
    expected = uniform_reference(low, high, index, position)
    assert torch.equal(uniform(low, high, index, position), expected)
