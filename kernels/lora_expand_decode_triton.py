"""`lora_expand` of decode steps, where every adapter has few tokens: nearly all time goes into reading B once.

A unit of work is a run of blocks of outputs of one tile, as long as it must be for every program to get one unit: what a
program reads before its first block, one load after another, it then reads once.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.dependent_launch import (
    let_next_start,
    letting_next_start,
    overlapping,
    wait_for_earlier,
)
from manylora.kernels.lora_planes_triton import can_prefetch, load_b, write_to
from manylora.kernels.lora_units_triton import load_slice, shortest_run
from manylora.kernels.lora_work import TILE_FIELDS, Launch, LoRAWork, num_programs, registers

_MAX_MODULES = 3
_AHEAD = 4  # blocks of a unit whose rows of B are asked for at its start
# The best of whole steps on an H200 (docs/benchmarks.md): for few tiles, and for more.
_FEW, _MANY = Launch(4, 128, 2, 4), Launch(8, 128, 2, 3)
_FEW_TILES = 8


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
    behind_shrink: bool = False,
    adds: bool = True,
) -> None:
    """As `lora_expand_triton.lora_expand`."""
    parts, chunks, _, _, columns = planes.shape
    modules = len(out_sizes)
    plane_width = columns // modules
    launch = launch or default_launch(work)
    blocks = [-(-size // launch.block) for size in out_sizes] + [0] * (_MAX_MODULES - modules)
    sizes = [*out_sizes] + [0] * (_MAX_MODULES - modules)
    grid = min(work.max_tiles * sum(blocks), num_programs(y.device, launch.programs))
    if not grid:
        return
    # With a number of ranks that does not divide 16, widths are multiples of that number alone.
    quantum = 8 if plane_width * parts % 16 == 0 else 1
    meta: dict[str, Any] = {
        "PARTS": parts,
        "CHUNKS": chunks,
        "QUANTUM": quantum,
        "PREFETCH": quantum == 8 and can_prefetch(y.device),
        "TILE_TOKENS": work.tile_tokens,
        "TILE_FIELDS": TILE_FIELDS,
        "BLOCK_N": launch.block,
        "BLOCK_R": max(16, triton.next_power_of_2(plane_width * parts)),
        "AHEAD": _AHEAD,
        "ADDS": adds,
        "STAGES": launch.num_stages,
        "num_warps": launch.num_warps,
        "num_stages": 1,  # of the loops that do not say otherwise
        "maxnreg": registers(launch),
        **(overlapping(y.device) if behind_shrink else letting_next_start(y.device)),
    }
    _lora_expand_decode[(grid,)](
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
        work.num_tiles,
        work.slices,
        y,
        y.stride(0),
        sizes[0],
        sizes[1],
        sizes[2],
        blocks[0],
        blocks[1],
        blocks[2],
        columns,
        plane_width,
        **meta,
    )


def default_launch(work: LoRAWork) -> Launch:
    """What is launched where nobody says how."""
    return _FEW if work.max_tiles <= _FEW_TILES else _MANY


@triton.jit(
    do_not_specialize=[
        "part_stride", "chunk_stride", "plane_stride", "blocks_0", "blocks_1", "blocks_2"
    ],
    do_not_specialize_on_alignment=["offsets", "widths", "scalings", "slices"],
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
    num_tiles,
    slices,
    y,
    y_stride,
    size_0,
    size_1,
    size_2,
    blocks_0,
    blocks_1,
    blocks_2,
    columns,
    plane_width,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUANTUM: tl.constexpr,
    PREFETCH: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    AHEAD: tl.constexpr,
    ADDS: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """Units are dealt out in turn, tile after tile.

    Outputs are the products' rows, which tensor cores take straight from shared memory, tokens their columns. Slices are
    multiplied one by one, so that time follows their widths; of up to four, the pieces are read side by side.
    Unless it ADDS to y, it writes every output of the tiles' tokens, zero where an adapter has no piece.
    """
    tiles_here = tl.load(num_tiles)
    run = shortest_run(tiles_here, blocks_0, blocks_1, blocks_2, tl.num_programs(0))
    runs_0, runs_1 = tl.cdiv(blocks_0, run), tl.cdiv(blocks_1, run)
    num_runs = runs_0 + runs_1 + tl.cdiv(blocks_2, run)
    num_units = tiles_here * num_runs
    unit = tl.program_id(0)
    while unit < num_units:
        tile = tiles + unit // num_runs * TILE_FIELDS
        first, tokens = tl.load(tile), tl.load(tile + 1)
        entry, count = tl.load(tile + 2), tl.load(tile + 3)

        index = unit % num_runs
        past_0 = (index >= runs_0).to(tl.int32)
        past_1 = (index >= runs_0 + runs_1).to(tl.int32)
        module = past_0 + past_1
        size = size_0 + past_0 * (size_1 - size_0) + past_1 * (size_2 - size_1)
        begin = (index - past_0 * runs_0 - past_1 * runs_1) * run * BLOCK_N
        end = tl.minimum(begin + run * BLOCK_N, size)
        ahead = tl.minimum(begin + AHEAD * BLOCK_N, end)
        y_module = y + past_0 * size_0 + past_1 * size_1
        planes_module = planes + module * plane_width
        offsets_at = offsets + module * offsets_module
        widths_at = widths + module * widths_module
        scalings_at = scalings + module * scalings_module
        unit += tl.num_programs(0)

        token = tl.arange(0, TILE_TOKENS)
        in_tile = token < tokens
        token = (first + token).to(tl.int64)
        if count <= 4:
            piece, width, hidden = load_slice(  # pyright: ignore[reportGeneralTypeIssues]
                pages, planes_module, part_stride, chunk_stride, plane_stride,
                offsets_at, offsets_row, widths_at, widths_row, scalings_at, scalings_row,
                tile + 4, 0, count, begin, ahead, token, in_tile, columns,
                PARTS, CHUNKS, QUANTUM, PREFETCH, BLOCK_R, OVERLAPS,
            )  # fmt: skip
            if count > 1:
                piece_1, width_1, hidden_1 = load_slice(
                    pages, planes_module, part_stride, chunk_stride, plane_stride,
                    offsets_at, offsets_row, widths_at, widths_row, scalings_at, scalings_row,
                    slices + entry + 1, 1, count, begin, ahead, token, in_tile, columns,
                    PARTS, CHUNKS, QUANTUM, PREFETCH, BLOCK_R, OVERLAPS,
                )  # fmt: skip
                piece_2, width_2, hidden_2 = load_slice(
                    pages, planes_module, part_stride, chunk_stride, plane_stride,
                    offsets_at, offsets_row, widths_at, widths_row, scalings_at, scalings_row,
                    slices + entry + 2, 2, count, begin, ahead, token, in_tile, columns,
                    PARTS, CHUNKS, QUANTUM, PREFETCH, BLOCK_R, OVERLAPS,
                )  # fmt: skip
                piece_3, width_3, hidden_3 = load_slice(
                    pages, planes_module, part_stride, chunk_stride, plane_stride,
                    offsets_at, offsets_row, widths_at, widths_row, scalings_at, scalings_row,
                    slices + entry + 3, 3, count, begin, ahead, token, in_tile, columns,
                    PARTS, CHUNKS, QUANTUM, PREFETCH, BLOCK_R, OVERLAPS,
                )  # fmt: skip
                if ADDS:
                    end = tl.where(width + width_1 + width_2 + width_3 > 0, end, begin)
                for start in tl.range(begin, end, BLOCK_N // 4, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
                    output = start + tl.arange(0, BLOCK_N // 4)
                    lora_b = load_b(piece, width, output, size, BLOCK_R)
                    lora_b_1 = load_b(piece_1, width_1, output, size, BLOCK_R)
                    lora_b_2 = load_b(piece_2, width_2, output, size, BLOCK_R)
                    lora_b_3 = load_b(piece_3, width_3, output, size, BLOCK_R)
                    acc = tl.dot(lora_b, hidden, input_precision="ieee")
                    acc = tl.dot(lora_b_1, hidden_1, acc, input_precision="ieee")
                    acc = tl.dot(lora_b_2, hidden_2, acc, input_precision="ieee")
                    acc = tl.dot(lora_b_3, hidden_3, acc, input_precision="ieee")
                    write_to(y_module, y_stride, tl.trans(acc), token, in_tile, output, size, ADDS)
            elif tokens == 1:
                if ADDS:
                    end = tl.where(width > 0, end, begin)
                y_row = y_module + first.to(tl.int64) * y_stride
                for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
                    output = start + tl.arange(0, BLOCK_N)
                    lora_b = load_b(piece, width, output, size, BLOCK_R)
                    total = tl.sum(tl.dot(lora_b, hidden, input_precision="ieee"), 1)
                    if ADDS:
                        total += tl.load(y_row + output, mask=output < size, other=0.0).to(tl.float32)
                    tl.store(y_row + output, total.to(y.dtype.element_ty), mask=output < size)
            else:
                if ADDS:
                    end = tl.where(width > 0, end, begin)
                for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):  # pyright: ignore[reportGeneralTypeIssues]
                    output = start + tl.arange(0, BLOCK_N)
                    lora_b = load_b(piece, width, output, size, BLOCK_R)
                    acc = tl.dot(lora_b, hidden, input_precision="ieee")
                    write_to(y_module, y_stride, tl.trans(acc), token, in_tile, output, size, ADDS)
        else:
            wait_for_earlier(OVERLAPS)
            let_next_start(OVERLAPS)
            pieces = tl.zeros((), tl.int32)
            for plane in range(count):
                slice_row = tl.load(slices + entry + plane).to(tl.int64)
                pieces += (tl.load(offsets_at + slice_row * offsets_row) >= 0).to(tl.int32)
            if ADDS:
                end = tl.where(pieces > 0, end, begin)
            for start in range(begin, end, BLOCK_N):
                output = start + tl.arange(0, BLOCK_N)
                start_end = tl.minimum(start + BLOCK_N, end)
                acc = tl.zeros((BLOCK_N, TILE_TOKENS), tl.float32)
                for plane in range(count):
                    piece, width, hidden = load_slice(
                        pages, planes_module, part_stride, chunk_stride, plane_stride,
                        offsets_at, offsets_row, widths_at, widths_row, scalings_at, scalings_row,
                        slices + entry + plane, plane, count, start, start_end, token, in_tile, columns,
                        PARTS, CHUNKS, QUANTUM, PREFETCH, BLOCK_R, OVERLAPS,
                    )  # fmt: skip
                    lora_b = load_b(piece, width, output, size, BLOCK_R)
                    acc = tl.dot(lora_b, hidden, acc, input_precision="ieee")
                write_to(y_module, y_stride, tl.trans(acc), token, in_tile, output, size, ADDS)
    wait_for_earlier(OVERLAPS)  # a program may have had no unit
