"""Greedy drawing: each row's best token, whether the row allows an honest draw, and the slot's last token, in one op."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels.greedy_work import GreedyWork
from manylora.kernels.sampling import rows_finite, sample_greedy


def draw_greedy(logits: Tensor, slots: Tensor, last_token: Tensor, work: GreedyWork) -> Tensor:
    """Returns (n,) int32: the best token of each row, the lowest id among equals; -1 where the row is not finite.

    logits: (n, vocab) bfloat16, float16 or float32. slots: (n,) int64. last_token: int32, one entry a slot, a column of
    a table; the rows' entries are set to the drawn tokens, and to some valid id where a row is not finite. Raises
    ValueError for more rows or tokens than `work` has room for.
    """
    if logits.is_cuda:
        from manylora.kernels import greedy_triton

        return greedy_triton.draw_greedy(logits, slots, last_token, work)
    return draw_greedy_reference(logits, slots, last_token)


def draw_greedy_reference(logits: Tensor, slots: Tensor, last_token: Tensor) -> Tensor:
    tokens = sample_greedy(logits).int()
    last_token.index_copy_(0, slots, tokens)
    return torch.where(rows_finite(logits), tokens, -1)
