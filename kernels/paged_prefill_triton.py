"""The Triton version of `paged_prefill_attention`: causal flash attention over the paged cache.

A block is some consecutive tokens of one row with all query heads of one KV head, so that K and V are read once for
the group and short prompts still fill a tile. Blocks are counted over all rows; the host knows only how many there are
at most, and programs past the last one end at once. Last blocks come first: they see the most keys.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.attention_tile import LOG2_E, attend_tile, find_row, page_ids, row_tile

_SHARED_BYTES = 160 << 10  # that the large blocks need, as Hopper has them
_LONG = 2048  # tokens of the average row from which large blocks are faster (docs/benchmarks.md)


class Launch(NamedTuple):
    """How the kernel is cut: block_m (token, head) pairs against block_n keys at a time."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def paged_prefill_attention(
    q: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    rows: Tensor,
    scale: float,
    out: Tensor,
    launch: Launch | None = None,
) -> None:
    """See `kernels.paged_attention`. `launch` is for tests and measurements."""
    num_tokens, heads, head_dim = q.shape
    kv_heads, page_size = kv_cache.shape[2:4]
    num_rows = len(rows)
    if not num_tokens:
        return
    if any(x.stride(-1) != 1 for x in (q, kv_cache, page_table, rows, out)):
        raise ValueError("paged_prefill_attention takes tensors whose last dimension is contiguous")
    group = heads // kv_heads
    block_d = max(16, triton.next_power_of_2(head_dim))
    launch = launch or _default_launch(q.device, q.dtype, block_d, num_tokens >= _LONG * num_rows)
    block_m = max(launch.block_m, triton.next_power_of_2(group))
    block_tokens = block_m // group
    source: list[Any] = [
        q,
        *q.stride()[:2],
        kv_cache,
        *kv_cache.stride()[:4],
        page_table,
        page_table.stride(0),
    ]
    source += [rows, rows.stride(0), num_rows, scale * LOG2_E, out, *out.stride()[:2]]
    constants: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": group,
        "HEAD_DIM": head_dim,
        "PAGE_SIZE": page_size,
        "BLOCK_TOKENS": block_tokens,
        "BLOCK_M": block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_D": block_d,
        "BLOCK_R": row_tile(num_rows),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    # Every row ends at most one block early.
    max_blocks = num_tokens // block_tokens + num_rows
    _prefill[(max_blocks * kv_heads,)](*source, **constants)


@cache
def _default_launch(device: torch.device, dtype: torch.dtype, block_d: int, long: bool) -> Launch:
    """`long`: rows are, on average."""
    if device.type == "cpu":  # the interpreter
        return Launch(block_m=16, block_n=32, num_warps=4, num_stages=1)
    if dtype.itemsize > 2:
        return Launch(block_m=32, block_n=32, num_warps=4, num_stages=2)
    block_n = min(64, 8192 // block_d)
    if torch.cuda.get_device_properties(device).shared_memory_per_block_optin < _SHARED_BYTES:
        return Launch(block_m=64, block_n=block_n // 2, num_warps=4, num_stages=3)
    if long:
        return Launch(block_m=128, block_n=block_n, num_warps=8, num_stages=3)
    return Launch(block_m=64, block_n=block_n, num_warps=4, num_stages=3)


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["rows"])
def _prefill(
    q,
    q_token_stride,
    q_head_stride,
    kv_cache,
    page_stride,
    v_offset,
    head_stride,
    slot_stride,
    page_table,
    page_table_stride,
    rows,
    rows_stride,
    num_rows,
    scale,
    out,
    out_token_stride,
    out_head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row_ids = tl.arange(0, BLOCK_R)
    new_of = tl.load(rows + row_ids * rows_stride + 2, mask=row_ids < num_rows, other=0).to(tl.int32)
    ends = tl.cumsum(tl.cdiv(new_of, BLOCK_TOKENS), 0)
    order = tl.program_id(0) // KV_HEADS
    num_blocks = tl.max(ends, 0)
    if order >= num_blocks:
        return
    block = num_blocks - (order + 1)
    head = tl.program_id(0) % KV_HEADS
    row, row_first = find_row(ends, block)
    entry = rows + row * rows_stride
    slot = tl.load(entry).to(tl.int64)
    start = tl.load(entry + 1).to(tl.int32)
    num_new = tl.load(entry + 2).to(tl.int32)
    token_offset = tl.load(entry + 3).to(tl.int64)

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    first = (block - row_first) * BLOCK_TOKENS
    tokens = first + m // GROUP
    real = (m < BLOCK_TOKENS * GROUP) & (tokens < num_new)
    exists = real[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = tl.minimum(tokens, num_new - 1)
    heads = head * GROUP + m % GROUP
    at = (token_offset + tokens) * q_token_stride + heads * q_head_stride
    pages = page_table + slot * page_table_stride
    kv_end = start + tl.minimum(first + BLOCK_TOKENS, num_new)
    page = page_ids(pages, tl.arange(0, BLOCK_N), kv_end, PAGE_SIZE)
    query = tl.load(q + at[:, None] + dims[None, :], mask=exists, other=0.0)

    kv_cache += head * head_stride
    visible = start + tokens
    seen_by_all = (start + first + 1) // BLOCK_N * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for begin in range(0, kv_end, BLOCK_N):
        positions = begin + tl.arange(0, BLOCK_N)
        next_page = page_ids(pages, positions + BLOCK_N, kv_end, PAGE_SIZE)
        acc, row_max, row_sum = attend_tile(
            query,
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
            HEAD_DIM,
            PAGE_SIZE,
            BLOCK_D,
            begin >= seen_by_all,
        )
        page = next_page
    at = (token_offset + tokens) * out_token_stride + heads * out_head_stride
    attended = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out + at[:, None] + dims[None, :], attended, mask=exists)
