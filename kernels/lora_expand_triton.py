"""The Triton version of `lora_expand`: one launch for all modules of a site, each element of y read and written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from manylora.kernels.lora_work import LoRAWork, num_programs

_MAX_MODULES = 3


def lora_expand(
    planes: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    scalings: torch.Tensor,
    work: LoRAWork,
    y: torch.Tensor,
    out_sizes: tuple[int, ...],
) -> None:
    """As `kernels.lora_expand`, but for what follows.

    `work` is prepared, and stands for segments and slices. planes: (parts, chunks, slices, T, modules · plane width), to
    be summed over `chunks`. scaling · plane is rounded to y's dtype before the product with Bᵀ. Every offset is a
    multiple of 32.
    """
    parts, chunks, _, _, columns = planes.shape
    modules = len(out_sizes)
    plane_width = columns // modules
    block_n = 128
    blocks = [triton.cdiv(size, block_n) for size in out_sizes] + [0] * (_MAX_MODULES - modules)
    sizes = [*out_sizes] + [0] * (_MAX_MODULES - modules)
    grid = min(work.max_tiles * sum(blocks), num_programs(y.device, 8 if work.decode else 4))
    if not grid:
        return
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
        work.counts,
        work.slices,
        y,
        y.stride(0),
        SIZE_0=sizes[0],
        SIZE_1=sizes[1],
        SIZE_2=sizes[2],
        BLOCKS_0=blocks[0],
        BLOCKS_1=blocks[1],
        BLOCKS_2=blocks[2],
        PLANE_WIDTH=plane_width,
        COLUMNS=columns,
        PARTS=parts,
        CHUNKS=chunks,
        # With a number of ranks that does not divide 16, widths are multiples of that number alone.
        QUANTUM=8 if plane_width * parts % 16 == 0 else 1,
        TILE_TOKENS=work.tile_tokens,
        BLOCK_N=block_n,
        BLOCK_R=max(16, triton.next_power_of_2(plane_width * parts)),
        num_warps=4,
        num_stages=2,
    )


@triton.jit(do_not_specialize=["part_stride", "chunk_stride", "plane_stride"])
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
    counts,
    slices,
    y,
    y_stride,
    SIZE_0: tl.constexpr,
    SIZE_1: tl.constexpr,
    SIZE_2: tl.constexpr,
    BLOCKS_0: tl.constexpr,
    BLOCKS_1: tl.constexpr,
    BLOCKS_2: tl.constexpr,
    PLANE_WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    QUANTUM: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """A unit of work is BLOCK_N columns of one module for one tile, over all slices of the tile's adapter."""
    BLOCKS: tl.constexpr = BLOCKS_0 + BLOCKS_1 + BLOCKS_2
    rank = tl.arange(0, BLOCK_R)
    for unit in range(tl.program_id(0), tl.load(counts) * BLOCKS, tl.num_programs(0)):
        tile, block = tiles + unit // BLOCKS * 4, tl.cast(unit % BLOCKS, tl.int32)
        first, tokens = tl.load(tile), tl.load(tile + 1)
        entry, count = tl.load(tile + 2), tl.load(tile + 3)
        past_0 = (block >= BLOCKS_0).to(tl.int32)
        past_1 = (block >= BLOCKS_0 + BLOCKS_1).to(tl.int32)
        module = past_0 + past_1
        size = tl.where(past_1 > 0, SIZE_2, tl.where(past_0 > 0, SIZE_1, SIZE_0))
        output = (block - past_0 * BLOCKS_0 - past_1 * BLOCKS_1) * BLOCK_N + tl.arange(0, BLOCK_N)
        in_module = output < size
        token = tl.arange(0, TILE_TOKENS)
        in_tile = token < tokens
        token = (first + token).to(tl.int64)

        acc = tl.zeros((TILE_TOKENS, BLOCK_N), tl.float32)
        pieces = tl.zeros((), tl.int32)
        for plane in range(count):
            slice_row = tl.load(slices + entry + plane).to(tl.int64)
            offset = tl.load(offsets + slice_row * offsets_row + module * offsets_module)
            if offset >= 0:
                pieces += 1
                width = tl.multiple_of(
                    tl.load(widths + slice_row * widths_row + module * widths_module), QUANTUM
                )
                scaling = tl.load(scalings + slice_row * scalings_row + module * scalings_module)
                in_slice = rank < width
                lora_b = tl.load(
                    pages + tl.multiple_of(offset, 32) + output[:, None] * width + rank[None, :],
                    mask=in_module[:, None] & in_slice[None, :],
                    other=0.0,
                )
                if PARTS == 1:
                    column = rank.to(tl.int64)
                else:
                    rows_each = width // PARTS
                    column = (rank // rows_each).to(tl.int64) * part_stride + rank % rows_each
                at = planes + tl.cast(plane, tl.int64) * plane_stride + module * PLANE_WIDTH
                at = at + token[:, None] * COLUMNS + column[None, :]
                hidden = tl.zeros((TILE_TOKENS, BLOCK_R), tl.float32)
                for chunk in tl.static_range(CHUNKS):
                    hidden += tl.load(
                        at + chunk * tl.cast(chunk_stride, tl.int64),
                        mask=in_tile[:, None] & in_slice[None, :],
                        other=0.0,
                    )
                hidden = (hidden * scaling).to(lora_b.dtype)
                acc = tl.dot(hidden, tl.trans(lora_b), acc, input_precision="ieee")
        if pieces > 0:
            y_column = past_0 * SIZE_0 + past_1 * SIZE_1 + output
            at = y + token[:, None] * y_stride + y_column[None, :]
            in_y = in_tile[:, None] & in_module[None, :]
            total = tl.load(at, mask=in_y, other=0.0).to(tl.float32) + acc
            tl.store(at, total.to(y.dtype.element_ty), mask=in_y)
