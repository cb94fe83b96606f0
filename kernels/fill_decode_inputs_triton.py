"""The Triton version of `fill_decode_inputs`: one launch before each replay of a graph."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.decode_inputs import Bounds, DecodeInputs

_BLOCK = 128


def fill_decode_inputs(
    inputs: DecodeInputs,
    payload: Tensor,
    bounds: Bounds,
    last_token: Tensor,
    page_table: Tensor,
    page_size: int,
    dummy_slot: int,
) -> None:
    """See `kernels.fill_decode_inputs`."""
    bucket, num_slices = len(inputs.rows), bounds["slices"][1]
    if (
        bounds["rows"][1] > bucket
        or bounds["segments"][1] > len(inputs.segments)
        or num_slices > len(inputs.slices)
    ):
        raise ValueError("the plan does not fit into the inputs of this graph")
    arguments: list[Any] = [payload]
    for name in ("rows", "pages", "segments", "slices"):
        arguments += bounds[name][:2]
    arguments += [last_token, last_token.stride(0), page_table, page_table.stride(0)]
    arguments += [inputs.rows, inputs.token_ids, inputs.positions, inputs.kv_slots, inputs.kv_lens]
    arguments += [inputs.segments, inputs.slices, bucket, len(inputs.segments), dummy_slot]
    grid = (-(-max(bucket, num_slices) // _BLOCK),)
    _fill_decode_inputs[grid](*arguments, PAGE_SIZE=page_size, BLOCK=_BLOCK)  # pyright: ignore[reportArgumentType]


_SIZES = (
    "first_row", "num_rows", "first_page", "num_pages", "first_segment", "num_segments", "first_slice", "num_slices",
    "bucket", "segment_room", "dummy_slot",
)  # fmt: skip


@triton.jit(do_not_specialize=_SIZES)
def _fill_decode_inputs(
    payload,
    first_row,
    num_rows,
    first_page,
    num_pages,
    first_segment,
    num_segments,
    first_slice,
    num_slices,
    last_token,
    last_token_stride,
    page_table,
    page_table_stride,
    rows,
    token_ids,
    positions,
    kv_slots,
    kv_lens,
    segments,
    slices,
    bucket,
    segment_room,
    dummy_slot,
    PAGE_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # What pages cannot change is read before anything is written: for the compiler no load may pass a store.
    lanes = tl.arange(0, BLOCK)
    index = tl.program_id(0) * BLOCK + lanes
    known, inside = index < num_rows, index < bucket
    source = payload + first_row + index * 4
    slot = tl.where(known, tl.load(source, mask=known, other=0), dummy_slot).to(tl.int64)
    start = tl.load(source + 1, mask=known, other=0).to(tl.int64)
    num_new = tl.load(source + 2, mask=known, other=0).to(tl.int64)
    offset = tl.load(source + 3, mask=known, other=0).to(tl.int64)
    flat = tl.program_id(0) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK)
    segment = tl.load(payload + first_segment + flat, mask=flat < num_segments * 4, other=0).to(tl.int64)
    slice_id = tl.load(payload + first_slice + index, mask=index < num_slices, other=0).to(tl.int64)
    token = tl.load(last_token + slot * last_token_stride, mask=inside, other=0)

    # Every program writes all pages, the same as the others do, since its rows may need any of them.
    for first in range(0, num_pages, BLOCK):
        entry = first + lanes
        known = entry < num_pages
        source = payload + first_page + entry * 3
        holder = tl.load(source, mask=known, other=0).to(tl.int64)
        place = tl.load(source + 1, mask=known, other=0)
        page = tl.load(source + 2, mask=known, other=0).to(tl.int64)
        tl.store(page_table + holder * page_table_stride + place, page, mask=known)
    tl.debug_barrier()
    page = tl.load(page_table + slot * page_table_stride + start // PAGE_SIZE, mask=inside, other=0)
    tl.store(rows + index * 4, slot, mask=inside)
    tl.store(rows + index * 4 + 1, start, mask=inside)
    tl.store(rows + index * 4 + 2, num_new, mask=inside)
    tl.store(rows + index * 4 + 3, offset, mask=inside)
    tl.store(token_ids + index, token.to(tl.int64), mask=inside)
    tl.store(positions + index, start, mask=inside)
    tl.store(kv_slots + index, page * PAGE_SIZE + start % PAGE_SIZE, mask=inside)
    tl.store(kv_lens + index, start + num_new, mask=inside)
    tl.store(segments + flat, segment, mask=flat < segment_room * 4)
    tl.store(slices + index, slice_id, mask=index < num_slices)
