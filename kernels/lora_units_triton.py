"""What a program of the decode expand finds out before its first block: which unit is its own, and its slice's piece of B
and plane."""

from __future__ import annotations

import triton
import triton.language as tl

from manylora.kernels.dependent_launch import let_next_start, wait_for_earlier
from manylora.kernels.lora_planes_triton import prefetch, scaled_plane


@triton.jit
def shortest_run(num_tiles, blocks_0, blocks_1, blocks_2, programs):
    """Blocks of a unit, so that the programs have one unit each if that can be: runs end with a module's blocks."""
    longest = tl.maximum(blocks_0, tl.maximum(blocks_1, blocks_2))
    run = tl.maximum(tl.cdiv(num_tiles * (blocks_0 + blocks_1 + blocks_2), programs), 1)
    units = num_tiles * (tl.cdiv(blocks_0, run) + tl.cdiv(blocks_1, run) + tl.cdiv(blocks_2, run))
    while (units > programs) & (run < longest):
        run += 1
        units = num_tiles * (tl.cdiv(blocks_0, run) + tl.cdiv(blocks_1, run) + tl.cdiv(blocks_2, run))
    return run


@triton.jit
def load_slice(
    pages,
    planes,
    part_stride,
    chunk_stride,
    plane_stride,
    offsets,
    offsets_row,
    widths,
    widths_row,
    scalings,
    scalings_row,
    row_at,
    plane,
    count,
    begin,
    end,
    token,
    in_tile,
    columns,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUANTUM: tl.constexpr,
    PREFETCH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Where a slice's B piece starts, its width, and its scaled plane, transposed (BLOCK_R, TILE_TOKENS), in the type of
    B; without a piece, or with plane ≥ count, width and plane are zero.

    begin, end: the first rows of B that will be read; there are some. planes, offsets, widths, scalings: pointers to the
    module's column; row_at: to the slice's row of the slice table.
    """
    known = plane < count
    slice_row = tl.load(row_at, mask=known, other=0).to(tl.int64)
    offset = tl.load(offsets + slice_row * offsets_row, mask=known, other=-1)
    width = tl.load(widths + slice_row * widths_row, mask=known, other=0)
    scaling = tl.load(scalings + slice_row * scalings_row, mask=known, other=0.0)
    has_piece = offset >= 0
    # Not a hint on the offset's load, which is lost where the compiler finds `known` to be always true.
    piece = tl.multiple_of(pages + tl.where(has_piece, offset, 0), 16)
    width = tl.multiple_of(tl.where(has_piece, width, 0), QUANTUM)
    scaling = tl.where(has_piece, scaling, 0.0)
    if PREFETCH:  # because the tile's plane, which is read next, comes before any product
        rows = piece + tl.cast(begin, tl.int64) * width
        prefetch(rows, (end - begin) * width * (pages.dtype.element_ty.primitive_bitwidth // 8))
    wait_for_earlier(OVERLAPS)
    let_next_start(OVERLAPS)
    hidden = scaled_plane(
        planes + tl.cast(plane, tl.int64) * plane_stride, part_stride, chunk_stride, token, in_tile, width,
        scaling, columns, PARTS, CHUNKS, BLOCK_R,
    )  # fmt: skip
    return piece, width, tl.trans(hidden.to(pages.dtype.element_ty))
