"""`lora_expand` of decode steps, where every adapter has few tokens: nearly all time goes into reading B once.

A unit of work is a short run of blocks of outputs of one tile, so small that most of its bytes are asked for at once and
so many that a GPU always has enough of them under way.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.lora_planes_triton import add_to, chunk_sum, load_b, scaled_plane
from manylora.kernels.lora_work import TILE_FIELDS, Launch, LoRAWork, num_programs

_MAX_MODULES = 3
_RUN = 4  # blocks of a unit, at most
_SLICES = 4  # whose B pieces are multiplied at once
_FEW, _MANY = Launch(4, 128, 4, 4), Launch(5, 256, 4, 4)
_FEW_TILES = 8  # up to here blocks are small, so that more programs have some


def lora_expand_decode(
    planes: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    scalings: torch.Tensor,
    work: LoRAWork,
    y: torch.Tensor,
    out_sizes: tuple[int, ...],
    launch: Launch | None = None,
) -> None:
    """As `lora_expand_triton.lora_expand`."""
    parts, chunks, _, _, columns = planes.shape
    modules = len(out_sizes)
    plane_width = columns // modules
    launch = launch or (_FEW if work.max_tiles <= _FEW_TILES else _MANY)
    programs = num_programs(y.device, launch.programs)
    blocks = [triton.cdiv(size, launch.block) for size in out_sizes]
    run = max(1, min(_RUN, work.max_tiles * sum(blocks) // programs))
    runs = [triton.cdiv(count, run) for count in blocks] + [0] * (_MAX_MODULES - modules)
    sizes = [*out_sizes] + [0] * (_MAX_MODULES - modules)
    num_units = work.max_tiles * sum(runs)
    if not num_units:
        return
    meta: dict[str, Any] = {
        "PARTS": parts,
        "CHUNKS": chunks,
        # With a number of ranks that does not divide 16, widths are multiples of that number alone.
        "QUANTUM": 8 if plane_width * parts % 16 == 0 else 1,
        "TILE_TOKENS": work.tile_tokens,
        "TILE_FIELDS": TILE_FIELDS,
        "BLOCK_N": launch.block,
        "BLOCK_R": max(16, triton.next_power_of_2(plane_width * parts)),
        "SLICES": _SLICES,
        "STAGES": launch.num_stages,
        "num_warps": launch.num_warps,
        "num_stages": 1,  # of the loops that do not say otherwise
    }
    _lora_expand_decode[(min(num_units, programs),)](
        planes,
        planes.stride(0),
        planes.stride(1),
        planes.stride(2),
        pages,
        offsets,
        offsets.stride(0),
        offsets.stride(1),
        widths,
        widths.stride(0),
        widths.stride(1),
        scalings,
        scalings.stride(0),
        scalings.stride(1),
        work.tiles,
        work.slices,
        y,
        y.stride(0),
        sizes[0],
        sizes[1],
        sizes[2],
        runs[0],
        runs[1],
        runs[2],
        run,
        num_units,
        columns,
        plane_width,
        **meta,
    )


@triton.jit
def _load_slices(
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
    slices,
    entry,
    first_slice,
    count,
    token,
    in_tile,
    columns,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUANTUM: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
):
    """Slices first_slice, … of a tile, at most SLICES: offset and width (SLICES,) of their B pieces, width 0 without
    one, and their scaled planes (TILE_TOKENS, SLICES · BLOCK_R) float32.

    planes, offsets, widths, scalings: pointers to the module's column.
    """
    index = first_slice + tl.arange(0, SLICES)
    known = index < count
    slice_row = tl.load(slices + entry + index, mask=known, other=0).to(tl.int64)
    offset = tl.load(offsets + slice_row * offsets_row, mask=known, other=-1)
    width = tl.load(widths + slice_row * widths_row, mask=known, other=0)
    scaling = tl.load(scalings + slice_row * scalings_row, mask=known, other=0.0)
    offset = tl.multiple_of(offset, 32)
    width = tl.multiple_of(tl.where(offset >= 0, width, 0), QUANTUM)
    scaling = tl.where(offset >= 0, scaling, 0.0)

    rank = tl.arange(0, BLOCK_R)
    column = tl.zeros((SLICES, BLOCK_R), tl.int64) + rank[None, :]
    if PARTS > 1:
        rows_each = tl.maximum(width // PARTS, 1)[:, None]
        column = (rank[None, :] // rows_each).to(tl.int64) * part_stride + rank[None, :] % rows_each
    column += index.to(tl.int64)[:, None] * plane_stride
    at = planes + token[:, None, None] * columns + column[None, :, :]
    stored = rank[None, :] < width[:, None]
    hidden = chunk_sum(at, in_tile[:, None, None] & stored[None, :, :], chunk_stride, CHUNKS)
    hidden *= scaling[None, :, None]
    return offset, width, tl.reshape(hidden, (token.shape[0], SLICES * BLOCK_R))


@triton.jit
def _load_pieces(pages, offset, width, output, size, BLOCK_R: tl.constexpr):
    """Rows `output` of several B pieces side by side: (outputs, pieces · BLOCK_R), zero outside of them."""
    rank = tl.arange(0, BLOCK_R)
    at = offset[None, :, None] + output[:, None, None] * width[None, :, None] + rank[None, None, :]
    stored = rank[None, None, :] < width[None, :, None]
    lora_b = tl.load(pages + at, mask=(output < size)[:, None, None] & stored, other=0.0)
    return tl.reshape(lora_b, (output.shape[0], offset.shape[0] * BLOCK_R))


@triton.jit(
    do_not_specialize=[
        "part_stride", "chunk_stride", "plane_stride", "runs_0", "runs_1", "runs_2", "run", "num_units"
    ]
)  # fmt: skip
def _lora_expand_decode(
    planes,
    part_stride,
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
    y,
    y_stride,
    size_0,
    size_1,
    size_2,
    runs_0,
    runs_1,
    runs_2,
    run,
    num_units,
    columns,
    plane_width,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUANTUM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SLICES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Units are dealt out in turn, tile after tile. A program is done at the first tile without tokens: its later units
    are further down the list.

    One slice of one token is multiplied and summed as it is; anything else goes through the tensor cores, outputs as
    rows, so that a few tokens make a small product.
    """
    num_runs = runs_0 + runs_1 + runs_2
    unit = tl.program_id(0)
    while unit < num_units:
        tile = tiles + unit // num_runs * TILE_FIELDS
        first, tokens = tl.load(tile), tl.load(tile + 1)
        entry, count, first_row = tl.load(tile + 2), tl.load(tile + 3), tl.load(tile + 4).to(tl.int64)

        index = unit % num_runs
        past_0 = (index >= runs_0).to(tl.int32)
        past_1 = (index >= runs_0 + runs_1).to(tl.int32)
        module = past_0 + past_1
        size = size_0 + past_0 * (size_1 - size_0) + past_1 * (size_2 - size_1)
        begin = (index - past_0 * runs_0 - past_1 * runs_1) * run * BLOCK_N
        end = tl.minimum(begin + run * BLOCK_N, size)
        y_module = y + past_0 * size_0 + past_1 * size_1
        planes_module = planes + module * plane_width
        offsets_module_at = offsets + module * offsets_module
        widths_module_at = widths + module * widths_module
        scalings_module_at = scalings + module * scalings_module
        unit = tl.where(tokens > 0, unit + tl.num_programs(0), num_units)

        if (tokens > 0) & (count == 1):
            offset = tl.multiple_of(tl.load(offsets_module_at + first_row * offsets_row), 32)
            width = tl.load(widths_module_at + first_row * widths_row)
            scaling = tl.load(scalings_module_at + first_row * scalings_row)
            width = tl.multiple_of(tl.where(offset >= 0, width, 0), QUANTUM)
            end = tl.where(offset >= 0, end, begin)
            token = tl.arange(0, TILE_TOKENS)
            in_tile = token < tokens
            token = (first + token).to(tl.int64)
            hidden = scaled_plane(
                planes_module, part_stride, chunk_stride, token, in_tile, width, scaling,
                columns, PARTS, CHUNKS, BLOCK_R,
            ).to(pages.dtype.element_ty)  # fmt: skip
            if tokens == 1:
                # The other rows are zero.
                only = tl.sum(hidden.to(tl.float32), 0)
                y_row = y_module + first.to(tl.int64) * y_stride
                for output in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                    output += tl.arange(0, BLOCK_N)
                    lora_b = load_b(pages, offset, width, output, size, BLOCK_R).to(tl.float32)
                    before = tl.load(y_row + output, mask=output < size, other=0.0).to(tl.float32)
                    after = before + tl.sum(lora_b * only[None, :], 1)
                    tl.store(y_row + output, after.to(y.dtype.element_ty), mask=output < size)
            else:
                for output in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
                    output += tl.arange(0, BLOCK_N)
                    lora_b = load_b(pages, offset, width, output, size, BLOCK_R)
                    acc = tl.dot(lora_b, tl.trans(hidden), input_precision="ieee")
                    add_to(y_module, y_stride, tl.trans(acc), token, in_tile, output, size)
        elif tokens > 0:
            token = tl.arange(0, TILE_TOKENS)
            in_tile = token < tokens
            token = (first + token).to(tl.int64)
            offset, width, hidden = _load_slices(
                planes_module, part_stride, chunk_stride, plane_stride, offsets_module_at, offsets_row,
                widths_module_at, widths_row, scalings_module_at, scalings_row, slices, entry, 0, count,
                token, in_tile, columns, PARTS, CHUNKS, QUANTUM, BLOCK_R, SLICES,
            )  # fmt: skip
            hidden = hidden.to(pages.dtype.element_ty)
            for output in range(begin, end, BLOCK_N // SLICES):
                output += tl.arange(0, BLOCK_N // SLICES)
                lora_b = _load_pieces(pages, offset, width, output, size, BLOCK_R)
                acc = tl.dot(lora_b, tl.trans(hidden), input_precision="ieee")
                for first_slice in range(SLICES, count, SLICES):
                    more_offset, more_width, more = _load_slices(
                        planes_module, part_stride, chunk_stride, plane_stride, offsets_module_at, offsets_row,
                        widths_module_at, widths_row, scalings_module_at, scalings_row, slices, entry,
                        first_slice, count, token, in_tile, columns, PARTS, CHUNKS, QUANTUM, BLOCK_R, SLICES,
                    )  # fmt: skip
                    lora_b = _load_pieces(pages, more_offset, more_width, output, size, BLOCK_R)
                    more = more.to(pages.dtype.element_ty)
                    acc = tl.dot(lora_b, tl.trans(more), acc, input_precision="ieee")
                add_to(y_module, y_stride, tl.trans(acc), token, in_tile, output, size)
