"""What greedy drawing leaves, row by row."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.greedy import draw_greedy
from manylora.kernels.greedy_work import GreedyWork

torch.set_num_threads(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_the_best_token_the_lowest_among_equals_or_minus_one(dtype: torch.dtype) -> None:
    inf, nan = torch.inf, torch.nan
    logits = [[0.0, 3.0, 3.0], [-2.0, -2.0, -2.0], [1.0, nan, 0.0], [inf, 1.0, 1.0], [1.0, 2.0, -inf]]
    entries = torch.full((7, 4), 99, dtype=torch.int32)
    last_token = entries[:, 2]
    slots = torch.tensor([6, 0, 2, 3, 5])
    work = GreedyWork(7, 3, torch.device("cpu"))
    tokens = draw_greedy(torch.tensor(logits, dtype=dtype), slots, last_token, work)
    assert tokens.dtype == torch.int32
    assert tokens.tolist() == [1, 0, -1, -1, -1]
    assert last_token[slots[:2]].tolist() == [1, 0]
    assert all(0 <= token < 3 for token in last_token[slots].tolist())
    assert last_token[[1, 4]].tolist() == [99, 99]
    assert (entries[:, [0, 1, 3]] == 99).all()
