"""The Triton version of `lora_expand`: one launch for all modules of a site, each element of y read and written once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.lora_expand_decode_triton import lora_expand_decode
from manylora.kernels.lora_planes_triton import load_b, scaled_plane, write_to
from manylora.kernels.lora_work import TILE_FIELDS, Launch, LoRAWork, num_programs

_MAX_MODULES = 3
_PREFILL = Launch(2, 128, 8, 3)


def lora_expand(
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
    """As `kernels.lora_expand`, but for what follows.

    `work` is listed, and stands for segments and slices. planes: (parts, chunks, slices, T, modules · plane width), to
    be summed over `chunks`. scaling · plane is rounded to y's dtype before the product with Bᵀ. Every offset is a
    multiple of 32. behind_shrink: the launch right before this one, in its stream, is the `lora_shrink` of its planes, and
    the work of a decode step; B is read while that still ends. adds: to y; if not, for decode steps, y is written where
    `work.has_adapter`.
    """
    if work.decode:
        tables = (offsets, widths, scalings)
        lora_expand_decode(planes, pages, *tables, work, y, out_sizes, launch, behind_shrink, adds)
        return
    if not adds:
        raise ValueError("only the expand of decode steps can do without adding to y")
    parts, chunks, _, _, columns = planes.shape
    modules = len(out_sizes)
    plane_width = columns // modules
    launch = launch or _PREFILL
    blocks = [triton.cdiv(size, launch.block) for size in out_sizes] + [0] * (_MAX_MODULES - modules)
    sizes = [*out_sizes] + [0] * (_MAX_MODULES - modules)
    grid = min(work.max_tiles * sum(blocks), num_programs(y.device, launch.programs))
    if not grid:
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
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
    }
    _lora_expand[(grid,)](
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


@triton.jit(
    do_not_specialize=["part_stride", "chunk_stride", "plane_stride", "blocks_0", "blocks_1", "blocks_2"],
    do_not_specialize_on_alignment=["offsets", "widths", "scalings", "slices"],
)
def _lora_expand(
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
    TILE_TOKENS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """All tiles' blocks of BLOCK_N outputs, one after another, are dealt out to the programs in equal contiguous runs.

    Within a run the blocks of one tile and module share what was read of the slice table and, as long as the adapter
    has one slice, its plane.
    """
    num_blocks = blocks_0 + blocks_1 + blocks_2
    total = tl.load(num_tiles) * num_blocks
    each = tl.cdiv(total, tl.num_programs(0))
    unit = tl.program_id(0) * each
    end = tl.minimum(unit + each, total)
    while unit < end:
        tile = tiles + unit // num_blocks * TILE_FIELDS
        first, tokens = tl.load(tile), tl.load(tile + 1)
        entry, count = tl.load(tile + 2), tl.load(tile + 3)
        token = tl.arange(0, TILE_TOKENS)
        in_tile = token < tokens
        token = (first + token).to(tl.int64)

        block = unit % num_blocks
        past_0 = (block >= blocks_0).to(tl.int32)
        past_1 = (block >= blocks_0 + blocks_1).to(tl.int32)
        module = past_0 + past_1
        size = size_0 + past_0 * (size_1 - size_0) + past_1 * (size_2 - size_1)
        blocks = blocks_0 + past_0 * blocks_1 + past_1 * blocks_2  # of this module and those before it
        y_module = y + past_0 * size_0 + past_1 * size_1
        block_end = tl.minimum(blocks, block + end - unit)
        unit += block_end - block
        first_block = past_0 * blocks_0 + past_1 * blocks_1
        planes_module = planes + module * plane_width
        offsets_at = offsets + module * offsets_module
        widths_at = widths + module * widths_module
        scalings_at = scalings + module * scalings_module

        if count == 1:
            slice_row = tl.load(slices + entry).to(tl.int64)
            offset = tl.multiple_of(tl.load(offsets_at + slice_row * offsets_row), 32)
            if offset >= 0:
                width = tl.multiple_of(tl.load(widths_at + slice_row * widths_row), QUANTUM)
                scaling = tl.load(scalings_at + slice_row * scalings_row)
                hidden = scaled_plane(
                    planes_module, part_stride, chunk_stride, token, in_tile, width, scaling,
                    columns, PARTS, CHUNKS, BLOCK_R,
                ).to(pages.dtype.element_ty)  # fmt: skip
                for index in range(block - first_block, block_end - first_block):
                    output = index * BLOCK_N + tl.arange(0, BLOCK_N)
                    lora_b = tl.trans(load_b(pages + offset, width, output, size, BLOCK_R))
                    acc = tl.dot(hidden, lora_b, input_precision="ieee")
                    write_to(y_module, y_stride, acc, token, in_tile, output, size, tl.constexpr(True))
        else:
            pieces = tl.zeros((), tl.int32)
            for plane in range(count):
                slice_row = tl.load(slices + entry + plane).to(tl.int64)
                pieces += (tl.load(offsets_at + slice_row * offsets_row) >= 0).to(tl.int32)
            if pieces > 0:
                for index in range(block - first_block, block_end - first_block):
                    output = index * BLOCK_N + tl.arange(0, BLOCK_N)
                    acc = tl.zeros((TILE_TOKENS, BLOCK_N), tl.float32)
                    for plane in range(count):
                        slice_row = tl.load(slices + entry + plane).to(tl.int64)
                        offset = tl.multiple_of(tl.load(offsets_at + slice_row * offsets_row), 32)
                        width = tl.load(widths_at + slice_row * widths_row)
                        width = tl.multiple_of(tl.where(offset >= 0, width, 0), QUANTUM)
                        scaling = tl.load(scalings_at + slice_row * scalings_row)
                        scaling = tl.where(offset >= 0, scaling, 0.0)
                        hidden = scaled_plane(
                            planes_module + tl.cast(plane, tl.int64) * plane_stride,
                            part_stride, chunk_stride, token, in_tile, width, scaling,
                            columns, PARTS, CHUNKS, BLOCK_R,
                        ).to(pages.dtype.element_ty)  # fmt: skip
                        lora_b = tl.trans(load_b(pages + offset, width, output, size, BLOCK_R))
                        acc = tl.dot(hidden, lora_b, acc, input_precision="ieee")
                    write_to(y_module, y_stride, acc, token, in_tile, output, size, tl.constexpr(True))
