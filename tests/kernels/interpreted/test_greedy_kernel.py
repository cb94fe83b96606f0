"""Greedy drawing in Triton against the reference: ties, rows that are not finite, every dtype, draw after draw."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.greedy_triton import draw_greedy
from manylora.kernels.greedy_work import PART, GreedyWork
from tests.kernels.greedy_cases import GreedyCase

torch.set_num_threads(1)
# numpy, which the interpreter computes with
quiet = pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("num_rows", "vocab"), [(9, 320), (6, 2 * PART + 9), (4, 3 * PART), (2, 1)])
def test_the_same_draws(num_rows: int, vocab: int, dtype: torch.dtype) -> None:
    case = GreedyCase(num_rows, vocab, dtype)
    expected, entries = case.expected()
    for _ in range(2):  # the second finds the counters as the first left them
        case.last_token.fill_(-5)
        assert torch.equal(draw_greedy(case.logits, case.slots, case.last_token, case.work), expected)
        assert torch.equal(case.entries, entries)
        assert not case.work.arrived.any()


@quiet
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("vocab", [40, 2 * PART + 9])
def test_rows_that_are_not_finite_are_told_and_remember_some_token(vocab: int, dtype: torch.dtype) -> None:
    case = GreedyCase(8, vocab, dtype)
    broken = case.poison()
    expected, entries = case.expected()
    assert torch.equal(draw_greedy(case.logits, case.slots, case.last_token, case.work), expected)
    assert torch.equal(expected == -1, broken)
    remembered = case.last_token[case.slots]
    assert ((remembered >= 0) & (remembered < vocab)).all()
    case.last_token[case.slots[broken]] = entries[:, 13][case.slots[broken]]
    assert torch.equal(case.entries, entries)


def test_the_lowest_finite_logit_is_a_logit() -> None:
    """It is what the kernel fills a part up with."""
    logits = torch.full((1, 9), torch.finfo(torch.float16).min, dtype=torch.float16)
    work, last = GreedyWork(1, 9, torch.device("cpu")), torch.tensor([5], dtype=torch.int32)
    assert draw_greedy(logits, torch.tensor([0]), last, work).tolist() == [0]
    assert last.tolist() == [0]


def test_no_room_is_an_error() -> None:
    case = GreedyCase(4, 100, torch.float32)
    for work in (GreedyWork(3, 100, torch.device("cpu")), GreedyWork(4, 0, torch.device("cpu"))):
        with pytest.raises(ValueError, match="no room"):
            draw_greedy(case.logits, case.slots, case.last_token, work)
    with pytest.raises(ValueError, match="contiguous"):
        draw_greedy(case.logits[:, ::2], case.slots, case.last_token, case.work)
