"""The kernel that makes the work list of a step."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from manylora.kernels.lora_work import ITEM_FIELDS, TILE_FIELDS, LoRAWork

_BLOCK = 16
_BLOCK_SEGMENTS = 256


def list_work(work: LoRAWork) -> None:
    """Fill `tiles`, `items`, `num_tiles` and `has_adapter`. Tiles lie in the order of their segments, items in that of their tiles."""
    meta: dict[str, Any] = {
        "TILE_TOKENS": work.tile_tokens,
        "TILE_FIELDS": TILE_FIELDS,
        "ITEM_FIELDS": ITEM_FIELDS,
        "BLOCK": _BLOCK,
        "BLOCK_SEGMENTS": _BLOCK_SEGMENTS,
    }
    num_flags = len(work.has_adapter)
    _list_work[(triton.cdiv(max(work.max_items, num_flags, 1), _BLOCK),)](
        work.segments,
        work.slices,
        work.tiles,
        work.items,
        work.num_tiles,
        work.has_adapter,
        len(work.segments),
        work.max_tiles,
        work.max_items,
        num_flags,
        **meta,
    )


@triton.jit
def _find_segment(sizes, index, segment, start, total):
    """Take further segments of `sizes` entries into the search for the segment that each `index` falls into.

    segment, start (BLOCK,): how many segments end at or before `index`, and where the last of them ends; `total`:
    entries of all segments so far.
    """
    ends = total + tl.cumsum(sizes, 0)
    before = ends[None, :] <= index[:, None]
    segment += tl.sum(before.to(tl.int32), 1)
    start = tl.maximum(start, tl.max(tl.where(before, ends[None, :], 0), 1))
    return segment, start, total + tl.sum(sizes, 0)


@triton.jit(
    do_not_specialize=["num_segments", "max_tiles", "max_items", "num_flags"],
    do_not_specialize_on_alignment=["segments", "slices"],
)
def _list_work(
    segments,
    slices,
    tiles,
    items,
    num_tiles_at,
    has_adapter,
    num_segments,
    max_tiles,
    max_items,
    num_flags,
    TILE_TOKENS: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    ITEM_FIELDS: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_SEGMENTS: tl.constexpr,
):
    """Every program finds the segments of its own BLOCK tiles, BLOCK items and BLOCK tokens, and writes 0 where there are
    none."""
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tile_segment = tl.zeros((BLOCK,), tl.int32)
    tile_start = tl.zeros((BLOCK,), tl.int32)
    item_segment = tl.zeros((BLOCK,), tl.int32)
    item_start = tl.zeros((BLOCK,), tl.int32)
    num_tiles = tl.zeros((), tl.int32)
    num_items = tl.zeros((), tl.int32)
    flag = tl.zeros((BLOCK,), tl.int32)
    for first_segment in range(0, num_segments, BLOCK_SEGMENTS):
        segment = first_segment + tl.arange(0, BLOCK_SEGMENTS)
        known = segment < num_segments
        first = tl.load(segments + segment * 4, mask=known, other=0).to(tl.int32)
        end = tl.load(segments + segment * 4 + 1, mask=known, other=0).to(tl.int32)
        count = tl.load(segments + segment * 4 + 3, mask=known, other=0).to(tl.int32)
        sizes = (end - first + TILE_TOKENS - 1) // TILE_TOKENS
        tile_segment, tile_start, num_tiles = _find_segment(sizes, index, tile_segment, tile_start, num_tiles)
        item_segment, item_start, num_items = _find_segment(
            sizes * count, index, item_segment, item_start, num_items
        )
        holds = (first[None, :] <= index[:, None]) & (index[:, None] < end[None, :])
        flag = tl.maximum(flag, tl.max(holds.to(tl.int32), 1))
    tl.store(has_adapter + index, flag, mask=index < num_flags)
    if tl.program_id(0) == 0:
        tl.store(num_tiles_at, num_tiles)

    is_tile = index < num_tiles
    first = tl.load(segments + tile_segment * 4, mask=is_tile, other=0).to(tl.int32)
    end = tl.load(segments + tile_segment * 4 + 1, mask=is_tile, other=0).to(tl.int32)
    entry = tl.load(segments + tile_segment * 4 + 2, mask=is_tile, other=0).to(tl.int32)
    count = tl.load(segments + tile_segment * 4 + 3, mask=is_tile, other=0).to(tl.int32)
    first += (index - tile_start) * TILE_TOKENS
    tokens = tl.where(is_tile, tl.minimum(end - first, TILE_TOKENS), 0)
    tile = tiles + index * TILE_FIELDS
    tl.store(tile, first, mask=is_tile)
    tl.store(tile + 1, tokens, mask=index < max_tiles)
    tl.store(tile + 2, entry, mask=is_tile)
    tl.store(tile + 3, count, mask=is_tile)
    tl.store(tile + 4, tl.load(slices + entry, mask=is_tile, other=0), mask=is_tile)

    is_item = index < num_items
    first = tl.load(segments + item_segment * 4, mask=is_item, other=0).to(tl.int32)
    end = tl.load(segments + item_segment * 4 + 1, mask=is_item, other=0).to(tl.int32)
    entry = tl.load(segments + item_segment * 4 + 2, mask=is_item, other=0).to(tl.int32)
    count = tl.load(segments + item_segment * 4 + 3, mask=is_item, other=1).to(tl.int32)
    plane = (index - item_start) % count
    first += (index - item_start) // count * TILE_TOKENS
    tokens = tl.where(is_item, tl.minimum(end - first, TILE_TOKENS), 0)
    item = items + index * ITEM_FIELDS
    tl.store(item, first, mask=is_item)
    tl.store(item + 1, tokens, mask=index < max_items)
    tl.store(item + 2, tl.load(slices + entry + plane, mask=is_item, other=0), mask=is_item)
    tl.store(item + 3, plane, mask=is_item)
