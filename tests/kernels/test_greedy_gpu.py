"""Greedy drawing on a CUDA device at real sizes, also from inside a graph."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.greedy import draw_greedy
from tests.kernels.greedy_cases import GreedyCase

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "vocab"), [(1, 128256), (64, 32000), (256, 128256), (7, 151936), (300, 999)]
)
def test_the_same_draws(num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    case = GreedyCase(num_rows, vocab, dtype, "cuda")
    expected, entries = case.expected()
    for _ in range(20):
        case.last_token.fill_(-5)
        assert torch.equal(draw_greedy(case.logits, case.slots, case.last_token, case.work), expected)
        assert torch.equal(case.entries, entries)


def test_rows_that_are_not_finite_are_told_and_remember_some_token() -> None:
    case = GreedyCase(64, 128256, torch.bfloat16, "cuda")
    broken = case.poison()
    expected, _ = case.expected()
    for _ in range(5):
        tokens = draw_greedy(case.logits, case.slots, case.last_token, case.work)
        assert torch.equal(tokens, expected)
        assert torch.equal(tokens == -1, broken)
        remembered = case.last_token[case.slots]
        assert ((remembered >= 0) & (remembered < 128256)).all()


def test_a_graph_draws_the_same_for_ever_new_logits() -> None:
    case = GreedyCase(48, 128256, torch.bfloat16, "cuda")
    draw_greedy(case.logits, case.slots, case.last_token, case.work)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = draw_greedy(case.logits, case.slots, case.last_token, case.work)
    for _ in range(50):
        case.logits.copy_(case.logits.roll(997, 1))
        expected, entries = case.expected()
        graph.replay()
        assert torch.equal(drawn, expected)
        assert torch.equal(case.entries, entries)
