"""The Triton version of `paged_decode_attention`: split-KV attention by a fixed number of programs.

The work of a step is its KV tiles: BLOCK_N tokens of one KV head of one row, in the order row, head, position. Each
program takes an equal run of them, wherever rows begin and end, so that any mix of lengths keeps every SM busy to the
end, and a captured graph serves any lengths. A head that lies in one program is finished there. A head cut by the
bounds of runs is left as partial results, at most two a program; the last program to leave one combines them all.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.attention_tile import LOG2_E, MASKED, attend_tile, page_ids, row_tile
from manylora.kernels.dependent_launch import let_next_start, overlapping, wait_for_earlier

_SHARED_BYTES = 104 << 10  # that a GPU must have for the large tiles
_COMBINED = 4096  # numbers of partial results on their way to the program that combines them


class Launch(NamedTuple):
    """How the kernel is cut. The GPU must hold all `programs` at once, or the last ones start late."""

    programs: int
    block_n: int
    num_warps: int
    num_stages: int


class Workspace(NamedTuple):
    """What programs leave for the one that combines. Made once: a captured graph keeps its addresses.

    All launches on a device share it, so they must not overlap: they are on one stream, or on streams that wait.
    """

    partial: Tensor  # (programs, 2, M, D) float32: 0, the head that the run begins within; 1, the one it ends within
    lse: Tensor  # (programs, 2, M) float32: log2 of the sum of the partial's exponentials
    arrived: Tensor  # (programs,) int32: parts there are of the head first cut by this run's end; 0 between launches


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
    block_g = triton.next_power_of_2(heads // kv_heads)
    block_m = max(16, block_g)
    block_d = max(16, triton.next_power_of_2(head_dim))
    launch = launch or _default_launch(q.device, q.dtype, block_d)
    workspace = _workspace(q.device, launch.programs, block_m, block_d)
    source: list[Any] = [q, *q.stride()[:2], kv_cache, *kv_cache.stride()[:4]]
    source += [page_table, page_table.stride(0), slots, slots.stride(0), kv_lens, kv_lens.stride(0)]
    others: list[Any] = [num_rows, scale * LOG2_E, out, *out.stride()[:2], *workspace]
    constants: dict[str, Any] = {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "PAGE_SIZE": page_size,
        "BLOCK_N": launch.block_n,
        "BLOCK_R": row_tile(num_rows),
        "BLOCK_G": block_g,
        "PARTS": max(1, min(8, _COMBINED // (block_g * block_d))),
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **overlapping(q.device),
    }
    _decode[(launch.programs,)](*source, *others, **constants)


@cache
def _default_launch(device: torch.device, dtype: torch.dtype, block_d: int) -> Launch:
    if device.type == "cpu":  # the interpreter
        return Launch(programs=5, block_n=32, num_warps=4, num_stages=1)
    gpu = torch.cuda.get_device_properties(device)
    sms = gpu.multi_processor_count
    if dtype.itemsize > 2:
        return Launch(programs=2 * sms, block_n=32, num_warps=4, num_stages=2)
    # Large tiles, few of them: the best of a sweep on an H200 at every batch size (docs/benchmarks.md).
    if gpu.shared_memory_per_block_optin < _SHARED_BYTES:
        return Launch(programs=2 * sms, block_n=min(64, 8192 // block_d), num_warps=4, num_stages=2)
    return Launch(programs=2 * sms, block_n=min(128, 16384 // block_d), num_warps=4, num_stages=2)


@cache
def _workspace(device: torch.device, programs: int, block_m: int, block_d: int) -> Workspace:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("paged_decode_attention must have run once with these sizes before it is captured")
    return Workspace(
        torch.empty(programs, 2, block_m, block_d, dtype=torch.float32, device=device),
        torch.empty(programs, 2, block_m, dtype=torch.float32, device=device),
        torch.zeros(programs, dtype=torch.int32, device=device),
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


@triton.jit
def _add(row, first, length, slot, other_row, other_first, other_length, other_slot):
    return row + other_row, first + other_first, length + other_length, slot + other_slot


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots", "kv_lens"])
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
    arrived,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    program = tl.program_id(0)
    rows = tl.arange(0, BLOCK_R)
    exists = rows < num_rows
    lengths = tl.load(kv_lens + rows * kv_lens_stride, mask=exists, other=0).to(tl.int32)
    slot_of = tl.load(slots + rows * slots_stride, mask=exists, other=0).to(tl.int32)
    row_tiles = tl.cdiv(lengths, BLOCK_N) * KV_HEADS
    ends = tl.cumsum(row_tiles, 0)
    total = tl.max(ends, 0)
    share, longer = total // tl.num_programs(0), total % tl.num_programs(0)
    work = _run_of(program, share, longer)
    run_end = _run_of(program + 1, share, longer)

    m = tl.arange(0, BLOCK_M)
    dims = tl.arange(0, BLOCK_D)
    real = (m < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    wait_for_earlier(OVERLAPS)
    let_next_start(OVERLAPS)
    while work < run_end:
        # All of the row at once, and page ids before the query: a load that waits for another costs half a microsecond.
        here = (ends - row_tiles <= work) & (work < ends)
        row, row_first, kv_len, slot = tl.reduce(
            (
                tl.where(here, rows, 0),
                tl.where(here, ends - row_tiles, 0),
                tl.where(here, lengths, 0),
                tl.where(here, slot_of, 0),
            ),
            0,
            _add,
        )
        head_tiles = tl.cdiv(kv_len, BLOCK_N)
        head = (work - row_first) // head_tiles
        head_first = row_first + head * head_tiles
        head_end = head_first + head_tiles
        first, end = work - head_first, tl.minimum(run_end, head_end) - head_first

        pages = page_table + slot.to(tl.int64) * page_table_stride
        page = page_ids(pages, first * BLOCK_N + tl.arange(0, BLOCK_N), kv_len, PAGE_SIZE)
        q_at = row.to(tl.int64) * q_row_stride + (head * GROUP + m)[:, None] * q_head_stride + dims[None, :]
        query = tl.load(q + q_at, mask=real, other=0.0)
        head_cache = kv_cache + head * head_stride
        visible = tl.zeros([BLOCK_M], tl.int32) + (kv_len - 1)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        for tile in range(first, end):
            positions = tile * BLOCK_N + tl.arange(0, BLOCK_N)
            next_page = page_ids(pages, positions + BLOCK_N, kv_len, PAGE_SIZE)
            acc, row_max, row_sum = attend_tile(
                query,
                acc,
                row_max,
                row_sum,
                positions,
                page,
                visible,
                kv_len,
                scale,
                head_cache,
                page_stride,
                v_offset,
                slot_stride,
                HEAD_DIM,
                PAGE_SIZE,
                BLOCK_D,
                MASKED,
            )
            page = next_page

        acc = acc / row_sum[:, None]
        head_out = out + row.to(tl.int64) * out_row_stride + head * GROUP * out_head_stride
        if first == 0 and end == head_tiles:
            out_at = head_out + m[:, None] * out_head_stride + dims[None, :]
            tl.store(out_at, acc.to(out.dtype.element_ty), mask=real)
        else:
            place = program * 2 + tl.where(first == 0, 1, 0)
            partial_at = (place * BLOCK_M + m)[:, None] * BLOCK_D + dims[None, :]
            tl.store(partial + partial_at, acc, mask=real)
            tl.store(lse + place * BLOCK_M + m, row_max + tl.log2(row_sum))
            first_part = _program_of(head_first, share, longer)
            last_part = _program_of(head_end - 1, share, longer)
            # All threads have stored before one of them says so; what the last to say so reads is then all there.
            tl.debug_barrier()
            before = tl.atomic_add(arrived + first_part, 1, sem="acq_rel")
            if before == last_part - first_part:
                tl.debug_barrier()
                tl.store(arrived + first_part, 0)
                _combine(
                    head_out, out_head_stride, partial, lse, first_part, last_part,
                    GROUP, HEAD_DIM, BLOCK_M, BLOCK_D, BLOCK_G, PARTS,
                )  # fmt: skip
        work = head_first + end


@triton.jit
def _combine(
    out,
    out_head_stride,
    partial,
    lse,
    first_part,
    last_part,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Write the head whose parts the programs first_part … last_part left, in this order whoever comes last.

    out: pointer to the head group's place in the result.
    """
    group, dims = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    real = (group < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    acc = tl.zeros([BLOCK_G, BLOCK_D], tl.float32)
    best = tl.full([BLOCK_G], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_G], tl.float32)
    for begin in range(first_part, last_part + 1, PARTS):
        for index in tl.static_range(PARTS):  # pyright: ignore[reportGeneralTypeIssues]
            part = begin + index
            known = tl.zeros([BLOCK_G], tl.int32) + part <= last_part
            # The head ends the run of its first program and begins the runs of all others.
            at = (part * 2 + tl.where(part == first_part, 1, 0)) * BLOCK_M + group
            # Not from the cache of this SM, which knows nothing of what others store.
            sums = tl.load(lse + at, mask=known, other=float("-inf"), cache_modifier=".cg")
            at = at[:, None] * BLOCK_D + dims[None, :]
            terms = tl.load(partial + at, mask=known[:, None] & real, other=0.0, cache_modifier=".cg")
            new_best = tl.maximum(best, sums)
            weights = tl.exp2(sums - new_best)
            decay = tl.exp2(best - new_best)
            acc = acc * decay[:, None] + terms * weights[:, None]
            total = total * decay + weights
            best = new_best
    at = out + group[:, None] * out_head_stride + dims[None, :]
    tl.store(at, (acc / total[:, None]).to(out.dtype.element_ty), mask=real)
