"""What the two attention kernels share: rows found by their blocks of work, and one step of online softmax over a tile
of a paged KV cache.

Scores are kept in units of log2: `scale` of the kernels is the model's times log2(e), so that exponentials are exp2.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
FEW_ROWS = 16  # no more than these are few
MASKED = tl.constexpr(True)


def row_tile(num_rows: int) -> int:
    """The size of the tile that holds all rows' lengths: few different ones, because each is a compilation."""
    return FEW_ROWS if num_rows <= FEW_ROWS else max(256, 1 << (num_rows - 1).bit_length())


@triton.jit
def find_row(ends, work):
    """The row that piece `work` belongs to, and the first piece of that row, where row i's pieces end at ends[i]."""
    row = tl.sum(tl.where(ends <= work, 1, 0), 0)
    first = tl.max(tl.where(ends <= work, ends, 0), 0)
    return row, first


@triton.jit
def page_ids(pages, positions, kv_end, PAGE_SIZE: tl.constexpr):
    """The pages of `positions` from the page table of their row; 0 for those from kv_end on.

    Callers ask for the next tile's before they attend to one: keys that wait for their addresses would come late.
    """
    # Unsigned, here and below: a division that must round negative numbers costs more.
    return tl.load(pages + positions.to(tl.uint32) // PAGE_SIZE, mask=positions < kv_end, other=0)


@triton.jit
def attend_tile(
    q,
    acc,
    row_max,
    row_sum,
    positions,
    page,
    visible,
    kv_end,
    scale,
    kv_cache,
    page_stride,
    v_offset,
    slot_stride,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    masked,
):
    """Take the keys at `positions` (N,) of one row, which are in pages `page` (N,), into the softmax of q (M, BLOCK_D).

    acc (M, BLOCK_D), row_max and row_sum (M,) float32 are the softmax so far, returned as they are afterwards.
    kv_cache: pointer to the KV head's part of page 0. Positions from kv_end on are not read. If `masked`, query i sees
    positions up to visible[i], else all. scale > 0.
    """
    in_row = positions < kv_end
    dims = tl.arange(0, BLOCK_D)
    at = kv_cache + page * page_stride + (positions.to(tl.uint32) % PAGE_SIZE).to(tl.int32) * slot_stride
    at = at[:, None] + dims[None, :]
    k = _load_tile(at, in_row, dims, HEAD_DIM)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    if masked:
        scores = tl.where(positions[None, :] <= visible[:, None], scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_max[:, None])  # one instruction, if scaled here
    decay = tl.exp2(row_max - new_max)
    row_sum = row_sum * decay + tl.sum(weights, 1)
    v = _load_tile(at + v_offset, in_row, dims, HEAD_DIM)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum


@triton.jit
def _load_tile(at, in_row, dims, HEAD_DIM: tl.constexpr):
    """(N, BLOCK_D) of K or V, zero where it does not exist: 0 · NaN would be NaN."""
    return tl.load(at, mask=in_row[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
