"""The Triton version of `paged_decode_attention`: split-KV attention by a fixed number of programs.

The work of a step is its KV tiles: BLOCK_N tokens of one KV head of one row, in the order row, head, position. Each
program takes an equal run of them, wherever rows begin and end, so that any mix of lengths keeps every SM busy to the
end, and a captured graph serves any lengths. A head that lies in one program is finished there. A head cut by the
bounds of runs is left as partial results, at most two a program, that a second kernel combines.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.attention_tile import LOG2_E, MASKED, attend_tile, find_row, row_tile

_COMBINE = 16  # partial results combined at a time


class Launch(NamedTuple):
    """How the kernel is cut. The GPU must hold all `programs` at once, or the last ones start late."""

    programs: int
    block_n: int
    num_warps: int
    num_stages: int


class Workspace(NamedTuple):
    """What programs leave for the combining kernel. Made once: a captured graph keeps its addresses."""

    partial: Tensor  # (programs, 2, M, D) float32: 0, the head that the run begins within; 1, the one it ends within
    lse: Tensor  # (programs, 2, M) float32: log2 of the sum of the partial's exponentials
    cut: Tensor  # (programs, 2) int32: the head (row · kv_heads + head) begun but not ended here, -1 for none; the
    # last program that has a part of it


def paged_decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    kv_lens: Tensor,
    scale: float,
    out: Tensor,
    launch: Launch | None = None,
) -> None:
    """See `kernels.paged_attention`. `launch` is for tests and measurements."""
    num_rows, heads, head_dim = q.shape
    kv_heads, page_size = kv_cache.shape[2:4]
    if not num_rows:
        return
    if any(x.stride(-1) != 1 for x in (q, kv_cache, page_table, out)):
        raise ValueError("paged_decode_attention takes tensors whose last dimension is contiguous")
    block_m = max(16, triton.next_power_of_2(heads // kv_heads))
    block_d = max(16, triton.next_power_of_2(head_dim))
    launch = launch or _default_launch(q.device, q.dtype, block_d)
    workspace = _workspace(q.device, launch.programs, block_m, block_d)
    constants: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
    }
    target: list[Any] = [out, *out.stride()[:2], *workspace]
    source: list[Any] = [
        q,
        *q.stride()[:2],
        kv_cache,
        *kv_cache.stride()[:4],
        page_table,
        page_table.stride(0),
    ]
    source += [slots, slots.stride(0), kv_lens, kv_lens.stride(0), num_rows, scale * LOG2_E]
    cutting: dict[str, Any] = {
        "PAGE_SIZE": page_size,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": row_tile(num_rows),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    _decode[(launch.programs,)](*source, *target, **constants, **cutting)
    combining: dict[str, Any] = {"BLOCK_S": _COMBINE}
    _combine[(launch.programs, heads // kv_heads)](*target, **constants, **combining)


@cache
def _default_launch(device: torch.device, dtype: torch.dtype, block_d: int) -> Launch:
    if device.type == "cpu":  # the interpreter
        return Launch(programs=5, block_n=32, num_warps=4, num_stages=1)
    sms = torch.cuda.get_device_properties(device).multi_processor_count
    if dtype.itemsize > 2:
        return Launch(programs=2 * sms, block_n=32, num_warps=4, num_stages=2)
    # Page ids and then K and V are loads that depend on each other: five stages are two tiles ahead. Registers allow
    # three programs on an SM of Hopper, shared memory just so.
    return Launch(programs=3 * sms, block_n=min(64, 8192 // block_d), num_warps=4, num_stages=5)


@cache
def _workspace(device: torch.device, programs: int, block_m: int, block_d: int) -> Workspace:
    return Workspace(
        torch.empty(programs, 2, block_m, block_d, dtype=torch.float32, device=device),
        torch.empty(programs, 2, block_m, dtype=torch.float32, device=device),
        torch.empty(programs, 2, dtype=torch.int32, device=device),
    )


@triton.jit
def _run_of(program, share, longer):
    """The first tile of a program's run, where the first `longer` programs have one tile more than `share`."""
    return program * share + tl.minimum(program, longer)


@triton.jit
def _program_of(tile, share, longer):
    """The program whose run has `tile`: the inverse of `_run_of`."""
    in_longer = tile // (share + 1)
    return tl.where(in_longer < longer, in_longer, (tile - longer) // tl.maximum(share, 1))


@triton.jit(do_not_specialize=["num_rows"])
def _decode(
    q,
    q_row_stride,
    q_head_stride,
    kv_cache,
    page_stride,
    v_offset,
    head_stride,
    slot_stride,
    page_table,
    page_table_stride,
    slots,
    slots_stride,
    kv_lens,
    kv_lens_stride,
    num_rows,
    scale,
    out,
    out_row_stride,
    out_head_stride,
    partial,
    lse,
    cut,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    program = tl.program_id(0)
    rows = tl.arange(0, BLOCK_R)
    lengths = tl.load(kv_lens + rows * kv_lens_stride, mask=rows < num_rows, other=0).to(tl.int32)
    ends = tl.cumsum(tl.cdiv(lengths, BLOCK_N) * KV_HEADS, 0)
    total = tl.max(ends, 0)
    share, longer = total // tl.num_programs(0), total % tl.num_programs(0)
    work = _run_of(program, share, longer)
    run_end = _run_of(program + 1, share, longer)

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    real = (m < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    cut_item = tl.full((), -1, tl.int32)
    cut_last = program
    while work < run_end:
        row, row_first = find_row(ends, work)
        kv_len = tl.load(kv_lens + row * kv_lens_stride).to(tl.int32)
        head_tiles = tl.cdiv(kv_len, BLOCK_N)
        head = (work - row_first) // head_tiles
        head_first = row_first + head * head_tiles
        head_end = head_first + head_tiles
        first, end = work - head_first, tl.minimum(run_end, head_end) - head_first

        q_at = row.to(tl.int64) * q_row_stride + (head * GROUP + m)[:, None] * q_head_stride + dims[None, :]
        query = tl.load(q + q_at, mask=real, other=0.0)
        pages = page_table + tl.load(slots + row * slots_stride).to(tl.int64) * page_table_stride
        head_cache = kv_cache + head * head_stride
        visible = tl.zeros([BLOCK_M], tl.int32) + (kv_len - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        for tile in range(first, end):
            positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            acc, row_max, row_sum = attend_tile(
                query,
                acc,
                row_max,
                row_sum,
                positions,
                visible,
                kv_len,
                scale,
                pages,
                head_cache,
                page_stride,
                v_offset,
                slot_stride,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_D,
                MASKED,
            )

        acc = acc / row_sum[:, None]
        if first == 0 and end == head_tiles:
            out_at = row.to(tl.int64) * out_row_stride + (head * GROUP + m)[:, None] * out_head_stride
            tl.store(out + out_at + dims[None, :], acc.to(out.dtype.element_ty), mask=real)
        else:
            place = program * 2 + tl.where(first == 0, 1, 0)
            partial_at = (place * BLOCK_M + m)[:, None] * BLOCK_D + dims[None, :]
            tl.store(partial + partial_at, acc, mask=real)
            tl.store(lse + place * BLOCK_M + m, row_max + tl.log2(row_sum))
            if first == 0:
                cut_item = row * KV_HEADS + head
                cut_last = _program_of(head_end - 1, share, longer)
        work = head_first + end
    tl.store(cut + program * 2, cut_item)
    tl.store(cut + program * 2 + 1, cut_last)


@triton.jit
def _combine(
    out,
    out_row_stride,
    out_head_stride,
    partial,
    lse,
    cut,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    program, m = tl.program_id(0), tl.program_id(1)
    item = tl.load(cut + program * 2)
    if item < 0:
        return
    last = tl.load(cut + program * 2 + 1)
    dims = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)
    best = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    for first in range(program, last + 1, BLOCK_S):
        parts = first + tl.arange(0, BLOCK_S)
        # The head ends the run of its first program and begins the runs of all others.
        place = (parts * 2 + tl.where(parts == program, 1, 0)) * BLOCK_M + m
        real = parts <= last
        sums = tl.load(lse + place, mask=real, other=float("-inf"))
        new_best = tl.maximum(best, tl.max(sums, 0))
        weights = tl.exp2(sums - new_best)
        decay = tl.exp2(best - new_best)
        at = place[:, None] * BLOCK_D + dims[None, :]
        terms = tl.load(partial + at, mask=real[:, None] & (dims < HEAD_DIM)[None, :], other=0.0)
        acc = acc * decay + tl.sum(terms * weights[:, None], 0)
        total = total * decay + tl.sum(weights, 0)
        best = new_best
    row, head = item // KV_HEADS, item % KV_HEADS
    at = row.to(tl.int64) * out_row_stride + (head * GROUP + m) * out_head_stride + dims
    tl.store(out + at, (acc / total).to(out.dtype.element_ty), mask=dims < HEAD_DIM)
