"""`lora_expand` of gate and up fused with the `silu_and_mul` that reads them, for decode steps: the sums stay in registers.

Rows of every tile are taken as `lora_expand_decode` does, gate and up of the same outputs together; rows of no tile have
no adapter, and are taken in groups as `silu_and_mul` would.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.activation_triton import gated
from manylora.kernels.dependent_launch import (
    NOT_OVERLAPPING,
    let_next_start,
    overlapping,
    wait_for_earlier,
)
from manylora.kernels.lora_planes_triton import can_prefetch, find_piece, load_b, prefetch_rows, scaled_plane
from manylora.kernels.lora_work import (
    MAX_FUSED_SLICES,
    TILE_FIELDS,
    Launch,
    LoRAWork,
    num_programs,
    registers,
    shortest_runs,
)
from manylora.kernels.lora_work_triton import in_no_tile

_QUANTUM = 8  # divides every width
# Blocks are of outputs of each of gate and up, and half as long with several slices.
_FEW, _MANY = Launch(4, 64, 2, 4), Launch(4, 128, 4, 4)
_FEW_TILES = 8  # as in `lora_expand_decode`
_BARE_BLOCK = 512  # outputs of a group of rows without an adapter


def lora_expand_silu_and_mul(
    planes: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    scalings: torch.Tensor,
    work: LoRAWork,
    y: torch.Tensor,
    launch: Launch | None = None,
    beside: bool = False,
) -> torch.Tensor:
    """The bits of `silu_and_mul` after `lora_expand_triton.lora_expand` of gate and up, which y (T, 2·n) holds side by
    side; returns a new (T, n) and leaves y as it was.

    Only for decode steps whose adapters have at most MAX_FUSED_SLICES slices, and planes (chunks, slices, T, 2 · plane width)
    of one rank. beside: as for `lora_expand`.
    """
    chunks, max_slices, num_tokens, columns = planes.shape
    if not work.decode or max_slices > MAX_FUSED_SLICES:
        raise ValueError(f"takes decode steps of at most {MAX_FUSED_SLICES} slices, not {max_slices}")
    size = y.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=y.dtype, device=y.device)
    launch = launch or (_FEW if work.max_tiles <= _FEW_TILES else _MANY)
    programs = num_programs(y.device, launch.programs)
    run, (runs,) = shortest_runs([triton.cdiv(size, launch.block)], programs // max(1, work.max_tiles))
    num_units = work.max_tiles * runs
    num_bare = triton.cdiv(num_tokens, work.tile_tokens) * triton.cdiv(size, _BARE_BLOCK)
    if not num_bare:
        return out
    meta: dict[str, Any] = {
        "PARTS": 1,
        "CHUNKS": chunks,
        "QUANTUM": _QUANTUM,
        "PREFETCH": can_prefetch(y.device),
        "TILE_TOKENS": work.tile_tokens,
        "TILE_FIELDS": TILE_FIELDS,
        "BLOCK_N": launch.block,
        "BLOCK_R": max(16, triton.next_power_of_2(columns // 2)),
        "BARE_BLOCK": _BARE_BLOCK,
        "STAGES": launch.num_stages,
        "num_warps": launch.num_warps,
        "num_stages": 1,  # of the loops that do not say otherwise
        "maxnreg": registers(launch),
        **(overlapping(y.device) if beside else NOT_OVERLAPPING),
    }
    table: list[Any] = [offsets, *offsets.stride(), widths, *widths.stride(), scalings, *scalings.stride()]
    arguments: list[Any] = [
        planes,
        *planes.stride()[:2],
        pages,
        *table,
        work.tiles,
        work.slices,
        work.max_tiles,
    ]
    arguments += [y, y.stride(0), out, num_tokens, size, run, runs, num_units, num_bare, columns]
    _lora_expand_silu_and_mul[(min(num_units + num_bare, programs),)](*arguments, **meta)
    return out


@triton.jit
def _find_pieces(pages, table, row_at, known, QUANTUM: tl.constexpr):
    """`find_piece` of gate and of up.

    table: offsets, widths and scalings, each with the strides of a row and a module. row_at: to the slice's row of it.
    """
    (offsets, offsets_row, offsets_module, widths, widths_row, widths_module,
     scalings, scalings_row, scalings_module) = table  # fmt: skip
    row = tl.load(row_at, mask=known, other=0).to(tl.int64)
    offset_at = offsets + row * offsets_row
    width_at = widths + row * widths_row
    scaling_at = scalings + row * scalings_row
    gate = find_piece(pages, offset_at, width_at, scaling_at, known, QUANTUM)
    offset_at += offsets_module
    width_at += widths_module
    scaling_at += scalings_module
    up = find_piece(pages, offset_at, width_at, scaling_at, known, QUANTUM)
    return gate, up


@triton.jit
def _prefetch_pieces(pieces, begin, end, PREFETCH: tl.constexpr):
    """Rows [begin, end) of both."""
    if PREFETCH:
        gate, up = pieces
        prefetch_rows(gate[0], gate[1], begin, end)
        prefetch_rows(up[0], up[1], begin, end)


@triton.jit
def _load_planes(plane, tile_rows, pieces, PARTS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_R: tl.constexpr):
    """A slice's scaled planes of gate and up, transposed (BLOCK_R, TILE_TOKENS), in the type of B."""
    token, in_tile, chunk_stride, columns = tile_rows
    gate, up = pieces
    hidden = scaled_plane(
        plane, 0, chunk_stride, token, in_tile, gate[1], gate[2], columns, PARTS, CHUNKS, BLOCK_R
    )
    hidden_up = scaled_plane(
        plane + columns // 2, 0, chunk_stride, token, in_tile, up[1], up[2], columns, PARTS, CHUNKS, BLOCK_R
    )
    type_of_b = gate[0].dtype.element_ty
    return tl.trans(hidden.to(type_of_b)), tl.trans(hidden_up.to(type_of_b))


@triton.jit
def _add_products(acc, acc_up, pieces, hidden, output, size, BLOCK_R: tl.constexpr):
    """A slice's B times its planes, added to the sums of gate and of up, (outputs, TILE_TOKENS) float32."""
    gate, up = pieces
    lora_b = load_b(gate[0], gate[1], output, size, BLOCK_R)
    lora_b_up = load_b(up[0], up[1], output, size, BLOCK_R)
    acc = tl.dot(lora_b, hidden[0], acc, input_precision="ieee")
    acc_up = tl.dot(lora_b_up, hidden[1], acc_up, input_precision="ieee")
    return acc, acc_up


@triton.jit
def _store_gated(y_at, out_at, delta, delta_up, has_gate, has_up, size, known):
    """`gated` of y plus the deltas, each sum rounded to the type of y. Without a piece y keeps its bits, of zeros too.

    y_at, out_at: pointers to outputs of gate and to the same of `out`.
    """
    gate = tl.load(y_at, mask=known, other=0.0)
    up = tl.load(y_at + size, mask=known, other=0.0)
    gate = tl.where(has_gate, (gate.to(tl.float32) + delta).to(gate.dtype), gate)
    up = tl.where(has_up, (up.to(tl.float32) + delta_up).to(up.dtype), up)
    product = gated(gate.to(tl.float32), up.to(tl.float32))
    tl.store(out_at, product.to(out_at.dtype.element_ty), mask=known)


@triton.jit(
    do_not_specialize=["chunk_stride", "plane_stride", "max_tiles", "num_tokens", "run", "runs", "num_units", "num_bare"],
    do_not_specialize_on_alignment=["slices"],
)  # fmt: skip
def _lora_expand_silu_and_mul(
    planes,
    chunk_stride,
    plane_stride,
    pages,
    offsets,
    offsets_row,
    offsets_module,
    widths,
    widths_row,
    widths_module,
    scalings,
    scalings_row,
    scalings_module,
    tiles,
    slices,
    max_tiles,
    y,
    y_stride,
    out,
    num_tokens,
    size,
    run,
    runs,
    num_units,
    num_bare,
    columns,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUANTUM: tl.constexpr,
    PREFETCH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BARE_BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Units of tiles are dealt out in turn, as in `lora_expand_decode`, and groups of bare rows from the last program on:
    it has the fewest units. Whether a group has bare rows is known from the list, before the wait."""
    table = (offsets, offsets_row, offsets_module, widths, widths_row, widths_module,
             scalings, scalings_row, scalings_module)  # fmt: skip
    bare = tl.num_programs(0) - 1 - tl.program_id(0)
    num_groups = tl.cdiv(num_tokens, TILE_TOKENS)
    while bare < num_bare:
        token = bare % num_groups * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
        is_bare = in_no_tile(tiles, max_tiles, token, TILE_FIELDS) & (token < num_tokens)
        if tl.sum(is_bare.to(tl.int32), 0) > 0:  # pyright: ignore[reportOperatorIssue]
            output = bare // num_groups * BARE_BLOCK + tl.arange(0, BARE_BLOCK)
            known = is_bare[:, None] & (output < size)[None, :]
            rows = token.to(tl.int64)[:, None]
            wait_for_earlier(OVERLAPS)
            _store_gated(
                y + rows * y_stride + output[None, :], out + rows * size + output[None, :],
                0.0, 0.0, False, False, size, known,
            )  # fmt: skip
        bare += tl.num_programs(0)

    unit = tl.program_id(0)
    while unit < num_units:
        tile = tiles + unit // runs * TILE_FIELDS
        first, tokens = tl.load(tile), tl.load(tile + 1)
        entry, count = tl.load(tile + 2), tl.load(tile + 3)
        begin = unit % runs * run * BLOCK_N
        end = tl.minimum(begin + run * BLOCK_N, size)
        unit = tl.where(tokens > 0, unit + tl.num_programs(0), num_units)
        if tokens > 0:
            token = tl.arange(0, TILE_TOKENS)
            in_tile = token < tokens
            token = (first + token).to(tl.int64)
            y_rows, out_rows = y + token[:, None] * y_stride, out + token[:, None] * size
            tile_rows = (token, in_tile, chunk_stride, columns)
            slice_0 = _find_pieces(pages, table, tile + 4, count > 0, QUANTUM)
            _prefetch_pieces(slice_0, begin, end, PREFETCH)
            if count > 1:
                more = slices + entry
                slice_1 = _find_pieces(pages, table, more + 1, count > 1, QUANTUM)
                slice_2 = _find_pieces(pages, table, more + 2, count > 2, QUANTUM)
                slice_3 = _find_pieces(pages, table, more + 3, count > 3, QUANTUM)
                _prefetch_pieces(slice_1, begin, end, PREFETCH)
                _prefetch_pieces(slice_2, begin, end, PREFETCH)
                _prefetch_pieces(slice_3, begin, end, PREFETCH)
                wait_for_earlier(OVERLAPS)
                let_next_start(OVERLAPS)
                hidden_0 = _load_planes(planes, tile_rows, slice_0, PARTS, CHUNKS, BLOCK_R)
                plane_1 = planes + tl.cast(plane_stride, tl.int64)
                plane_2 = plane_1 + plane_stride
                plane_3 = plane_2 + plane_stride
                hidden_1 = _load_planes(plane_1, tile_rows, slice_1, PARTS, CHUNKS, BLOCK_R)
                hidden_2 = _load_planes(plane_2, tile_rows, slice_2, PARTS, CHUNKS, BLOCK_R)
                hidden_3 = _load_planes(plane_3, tile_rows, slice_3, PARTS, CHUNKS, BLOCK_R)
                has_gate = slice_0[0][1] + slice_1[0][1] + slice_2[0][1] + slice_3[0][1] > 0
                has_up = slice_0[1][1] + slice_1[1][1] + slice_2[1][1] + slice_3[1][1] > 0
                for start in tl.range(begin, end, BLOCK_N // 2, num_stages=STAGES - 1):  # pyright: ignore[reportGeneralTypeIssues]
                    output = start + tl.arange(0, BLOCK_N // 2)
                    zeros = tl.zeros((BLOCK_N // 2, TILE_TOKENS), tl.float32)
                    acc, acc_up = _add_products(zeros, zeros, slice_0, hidden_0, output, size, BLOCK_R)
                    acc, acc_up = _add_products(acc, acc_up, slice_1, hidden_1, output, size, BLOCK_R)
                    acc, acc_up = _add_products(acc, acc_up, slice_2, hidden_2, output, size, BLOCK_R)
                    acc, acc_up = _add_products(acc, acc_up, slice_3, hidden_3, output, size, BLOCK_R)
                    known = in_tile[:, None] & (output < size)[None, :]
                    y_at, out_at = y_rows + output[None, :], out_rows + output[None, :]
                    _store_gated(y_at, out_at, tl.trans(acc), tl.trans(acc_up), has_gate, has_up, size, known)
            else:
                wait_for_earlier(OVERLAPS)
                let_next_start(OVERLAPS)
                hidden_0 = _load_planes(planes, tile_rows, slice_0, PARTS, CHUNKS, BLOCK_R)
                has_gate, has_up = slice_0[0][1] > 0, slice_0[1][1] > 0
                if tokens == 1:
                    y_row, out_row = y + first.to(tl.int64) * y_stride, out + first.to(tl.int64) * size
                    # Two outputs a thread: less could not be copied ahead.
                    for start in tl.range(begin, end, 2 * BLOCK_N, num_stages=STAGES - 1):  # pyright: ignore[reportGeneralTypeIssues]
                        output = start + tl.arange(0, 2 * BLOCK_N)
                        zeros = tl.zeros((2 * BLOCK_N, TILE_TOKENS), tl.float32)
                        acc, acc_up = _add_products(zeros, zeros, slice_0, hidden_0, output, end, BLOCK_R)
                        delta, delta_up, known = tl.sum(acc, 1), tl.sum(acc_up, 1), output < end
                        _store_gated(
                            y_row + output, out_row + output, delta, delta_up, has_gate, has_up, size, known
                        )
                else:
                    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
                        output = start + tl.arange(0, BLOCK_N)
                        zeros = tl.zeros((BLOCK_N, TILE_TOKENS), tl.float32)
                        acc, acc_up = _add_products(zeros, zeros, slice_0, hidden_0, output, size, BLOCK_R)
                        known = in_tile[:, None] & (output < size)[None, :]
                        y_at, out_at = y_rows + output[None, :], out_rows + output[None, :]
                        _store_gated(
                            y_at, out_at, tl.trans(acc), tl.trans(acc_up), has_gate, has_up, size, known
                        )
    wait_for_earlier(OVERLAPS)
