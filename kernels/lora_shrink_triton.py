"""The Triton version of `lora_shrink`: one launch for all modules of a site, over a work list in device memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.dependent_launch import (
    NOT_OVERLAPPING,
    let_next_start,
    overlapping,
    prefetch_to_l2,
    wait_for_earlier,
)
from manylora.kernels.lora_work import ITEM_FIELDS, Launch, LoRAWork, num_programs

_PREFILL = Launch(2, 128, 4, 3)
# By the columns of a block of planes: a warp for every 16, and programs that fit beside those of the base product.
_DECODE = {16: Launch(8, 128, 1, 5), 32: Launch(8, 64, 2, 5), 64: Launch(6, 64, 4, 4)}
_LINE = 128  # bytes of a cache line


def lora_shrink(
    x: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    work: LoRAWork,
    planes: torch.Tensor,
    split: int,
    launch: Launch | None = None,
    beside: bool = False,
) -> None:
    """As `kernels.lora_shrink`, but for what follows.

    `work` is listed, and stands for segments and slices. planes: (chunks, slices, T, modules · plane width): each plane
    is the sum over `chunks`, every one of which covers a part of x's columns. Every offset is a multiple of 32.
    Of a decode step it may start before the kernel that writes x has ended. beside: the launch right before this one is
    the product of the same x, by `linear_triton`; the two run side by side.
    """
    num_chunks, _, num_tokens, columns = planes.shape
    features, modules = x.shape[1], offsets.shape[1]
    block_n = _block_of(columns)
    launch = launch or (decode_launch(columns) if work.decode else _PREFILL)
    # Blocks are meant for elements of 2 bytes, and no wider than a chunk.
    block_k = min(
        launch.block * 2 // max(2, x.itemsize), triton.next_power_of_2(triton.cdiv(features, num_chunks))
    )
    block_k = max(16, block_k)
    grid = min(work.max_items * num_chunks, num_programs(x.device, launch.programs))
    if not grid:
        return
    chunk = triton.cdiv(triton.cdiv(features, num_chunks), block_k) * block_k
    meta: dict[str, Any] = {
        "FEATURES": features,
        "MODULES": modules,
        "PLANE_WIDTH": columns // modules,
        "SPLIT": split,
        "CHUNKS": num_chunks,
        "CHUNK": chunk,
        "TILE_TOKENS": work.tile_tokens,
        "ITEM_FIELDS": ITEM_FIELDS,
        # Tensor cores take 16 rows of A with 8 tokens, but not 8 tokens with columns of A.
        "A_FIRST": work.decode,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "LINES": triton.next_power_of_2(triton.cdiv(chunk * x.itemsize, _LINE)),
        "LINE": _LINE // x.itemsize,
        "BESIDE": beside,
        **(overlapping(x.device) if work.decode else NOT_OVERLAPPING),
    }
    _lora_shrink[(grid,)](
        x,
        x.stride(0),
        pages,
        offsets,
        offsets.stride(0),
        offsets.stride(1),
        widths,
        widths.stride(0),
        widths.stride(1),
        work.items,
        work.max_items * num_chunks,
        planes,
        num_tokens,
        planes.stride(0),
        planes.stride(1),
        **meta,
    )


def decode_launch(columns: int) -> Launch:
    """How it is launched for planes of so many columns in a decode step."""
    return _DECODE.get(_block_of(columns), _DECODE[64])


def _block_of(columns: int) -> int:
    return max(16, 1 << (columns - 1).bit_length())


@triton.jit(
    do_not_specialize=["num_units", "num_tokens", "chunk_stride", "plane_stride"],
    do_not_specialize_on_alignment=["offsets", "widths"],  # sites lie at any place of a table
)
def _lora_shrink(
    x,
    x_stride,
    pages,
    offsets,
    offsets_row,
    offsets_module,
    widths,
    widths_row,
    widths_module,
    items,
    num_units,
    planes,
    num_tokens,
    chunk_stride,
    plane_stride,
    FEATURES: tl.constexpr,
    MODULES: tl.constexpr,
    PLANE_WIDTH: tl.constexpr,
    SPLIT: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    A_FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LINES: tl.constexpr,
    LINE: tl.constexpr,
    BESIDE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    """A unit of work is one chunk of one item: a (TILE_TOKENS, BLOCK_N) block of one plane, all modules side by side.

    A program is done at the first unit without tokens: its later ones are further down the list.

    BESIDE the product that was launched before it, x is older than that and ready; all this has to wait for is its own
    end, so that what comes next finds both ended. What comes next may only read weights and lists before its own wait.
    Elsewhere the kernel before it writes x, and A is on its way to the L2 cache meanwhile.
    """
    if BESIDE:
        let_next_start(OVERLAPS)
    column = tl.arange(0, BLOCK_N)
    module, row = column // PLANE_WIDTH, column % PLANE_WIDTH
    in_plane = module < MODULES
    unit = tl.program_id(0)
    while unit < num_units:
        item = items + unit // CHUNKS * ITEM_FIELDS
        chunk = unit % CHUNKS
        first, tokens = tl.load(item), tl.load(item + 1)
        slice_row, plane = tl.load(item + 2).to(tl.int64), tl.load(item + 3).to(tl.int64)
        in_list = in_plane & (column < tl.where(tokens > 0, BLOCK_N, 0))

        offset = tl.load(offsets + slice_row * offsets_row + module * offsets_module, mask=in_list, other=-1)
        width = tl.load(widths + slice_row * widths_row + module * widths_module, mask=in_list, other=0)
        stored = (offset >= 0) & (row < width // SPLIT)
        lora_a = pages + tl.multiple_of(offset, 32) + row * FEATURES
        token = tl.arange(0, TILE_TOKENS)
        in_tile = token < tokens
        token = (first + token).to(tl.int64)
        rows_x = x + token * x_stride

        begin = chunk * CHUNK
        past = tl.where(tokens > 0, tl.minimum(begin + CHUNK, FEATURES), begin)
        if OVERLAPS and not BESIDE:
            line = begin + tl.arange(0, LINES) * LINE
            prefetch_to_l2(lora_a[:, None] + line[None, :], stored[:, None] & (line < past)[None, :])
            wait_for_earlier(OVERLAPS)
            let_next_start(OVERLAPS)
        acc = tl.zeros((BLOCK_N, TILE_TOKENS) if A_FIRST else (TILE_TOKENS, BLOCK_N), tl.float32)
        for start in range(begin, past, BLOCK_K):
            feature = start + tl.arange(0, BLOCK_K)
            known = feature < FEATURES
            block_a = tl.load(
                lora_a[:, None] + feature[None, :], mask=stored[:, None] & known[None, :], other=0.0
            )
            block_x = tl.load(
                rows_x[:, None] + feature[None, :], mask=in_tile[:, None] & known[None, :], other=0.0
            )
            if A_FIRST:
                acc = tl.dot(block_a, tl.trans(block_x), acc, input_precision="ieee")
            else:
                acc = tl.dot(block_x, tl.trans(block_a), acc, input_precision="ieee")

        if A_FIRST:
            acc = tl.trans(acc)
        target = planes + tl.cast(chunk, tl.int64) * chunk_stride + plane * plane_stride
        target += token[:, None] * (MODULES * PLANE_WIDTH) + column[None, :]
        tl.store(target, acc, mask=in_tile[:, None] & stored[None, :])
        unit = tl.where(tokens > 0, unit + tl.num_programs(0), num_units)
    wait_for_earlier(OVERLAPS)
