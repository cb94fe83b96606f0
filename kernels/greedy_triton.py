"""The Triton version of `draw_greedy`: one pass over the logits in their own dtype.

A row is split over several programs; the one that arrives last puts together what all have found. Nothing depends on
which one that is: the larger logit wins, the lower id among equals.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.dependent_launch import overlapping, wait_for_earlier
from manylora.kernels.greedy_work import PART, GreedyWork

_LANES = 1024  # 8 a thread, thus 16 bytes at a time of 2-byte logits
_WARPS = 4


def draw_greedy(logits: Tensor, slots: Tensor, last_token: Tensor, work: GreedyWork) -> Tensor:
    """See `kernels.greedy`; rows of contiguous logits."""
    num_rows, vocab = logits.shape
    if num_rows > len(work.arrived) or vocab > work.num_parts * PART:
        raise ValueError(f"no room for logits of {num_rows} rows of {vocab} tokens")
    if logits.stride(1) != 1 < vocab:
        raise ValueError("draw_greedy takes rows of contiguous logits")
    tokens = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    num_parts = -(-vocab // PART)
    meta: dict[str, Any] = {
        "LOWEST": torch.finfo(logits.dtype).min,
        "PARTS": num_parts,
        "BLOCK_PARTS": 1 << (num_parts - 1).bit_length(),
        "STEPS": PART // _LANES,
        "LANES": _LANES,
        "num_warps": _WARPS,
        **overlapping(logits.device),
    }
    if num_rows:
        arguments: list[Any] = [logits, logits.stride(0), vocab, slots, slots.stride(0)]
        arguments += [last_token, last_token.stride(0), work.best, work.token, work.arrived, tokens]
        _draw_greedy[(num_parts, num_rows)](*arguments, **meta)
    return tokens


@triton.jit
def _better(best, token, vocab):
    """The largest of `best`, and the lowest token that has it; always a valid one."""
    highest = tl.max(best, 0)
    return highest, tl.min(tl.where(best == highest, tl.minimum(token, vocab - 1), vocab - 1), 0)


@triton.jit(do_not_specialize=["slots_stride"])  # what graphs have compiled serves every other step too
def _draw_greedy(
    logits,
    row_stride,
    vocab,
    slots,
    slots_stride,
    last_token,
    last_token_stride,
    found_best,
    found_token,
    arrived,
    tokens,
    LOWEST: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    STEPS: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    part = tl.program_id(0)
    wait_for_earlier(OVERLAPS)
    slot = tl.load(slots + row * slots_stride)
    token = part * (STEPS * LANES) + tl.arange(0, LANES)
    source = logits + row * row_stride + token
    best = tl.full((LANES,), float("-inf"), tl.float32)
    best_step = tl.zeros((LANES,), tl.int32)
    broken = tl.zeros((LANES,), tl.float32)
    # Few instructions a logit: at 256 rows two thirds of what an SM can execute while memory delivers them.
    for step in tl.static_range(STEPS):  # pyright: ignore[reportGeneralTypeIssues]
        # The filling is finite, and no better than any logit before it in a finite row.
        inside = token < vocab - step * LANES
        values = tl.load(source + step * LANES, mask=inside, other=LOWEST).to(tl.float32)
        best_step = tl.where(values > best, step, best_step)
        best = tl.maximum(best, values)
        broken += values * 0.0  # NaN from the first that is not finite
    # Infinite is what no finite row's best is: it says that the row is not.
    best = tl.where(broken == 0.0, best, float("inf"))
    highest, chosen = _better(best, token + best_step * LANES, vocab)

    own = row * PARTS + part
    tl.store(found_best + own, highest)
    tl.store(found_token + own, chosen)
    tl.debug_barrier()
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == PARTS - 1:
        parts = tl.arange(0, BLOCK_PARTS)
        all_best = tl.load(found_best + row * PARTS + parts, mask=parts < PARTS, other=float("-inf"))
        all_token = tl.load(found_token + row * PARTS + parts, mask=parts < PARTS, other=0)
        highest, chosen = _better(all_best, all_token, vocab)
        tl.store(arrived + row, 0)
        tl.store(last_token + slot * last_token_stride, chosen)
        finite = highest < float("inf")  # pyright: ignore[reportOperatorIssue]
        tl.store(tokens + row, tl.where(finite, chosen, -1))
