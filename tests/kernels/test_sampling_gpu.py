"""Sampling on a CUDA device at real sizes: the draws of the reference, also from inside a graph."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.sampling import sample, sample_reference, uniform, uniform_reference
from tests.kernels.sampling_cases import sampling_case

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("num_rows", "vocab"), [(1, 50), (60, 32000), (300, 1000), (256, 128256), (24, 151936)]
)
def test_the_same_draws(num_rows: int, vocab: int) -> None:
    """Exponentials of the two differ in their last bits: a draw next to a token's edge may fall on the other side."""
    logits, arguments = sampling_case(num_rows, vocab, "cuda")
    drawn, expected = sample(logits, *arguments), sample_reference(logits, *arguments)
    assert (drawn != expected).sum() <= num_rows // 50


def test_a_graph_draws_the_same() -> None:
    logits, arguments = sampling_case(48, 32000, "cuda")
    expected = sample(logits, *arguments)
    static = torch.zeros_like(logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = sample(static, *arguments)
    static.copy_(logits)
    for _ in range(3):
        drawn.fill_(-1)
        graph.replay()
        assert torch.equal(drawn, expected)


def test_rows_that_are_not_finite_end_with_some_token() -> None:
    logits, arguments = sampling_case(24, 9001, "cuda")
    logits[::2, 77] = torch.nan
    logits[1::3, 500:510] = torch.inf
    logits[5] = torch.nan
    logits[6] = -torch.inf
    drawn = sample(logits, *arguments)
    assert (drawn >= 0).all()
    assert (drawn < 9001).all()


def test_uniform() -> None:
    low, high = torch.randint(-(2**31), 2**31, (1000, 2), device="cuda").unbind(1)
    index = torch.arange(1000, device="cuda")
    drawn = uniform(low, high, index % 3, index * 17)
    assert torch.equal(drawn, uniform_reference(low, high, index % 3, index * 17))
