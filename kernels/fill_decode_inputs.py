"""From a plan to what a captured decode step reads: outside the graph, in one launch."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels.decode_inputs import Bounds, DecodeInputs


def fill_decode_inputs(
    inputs: DecodeInputs,
    payload: Tensor,
    bounds: Bounds,
    last_token: Tensor,
    page_table: Tensor,
    page_size: int,
    dummy_slot: int,
) -> None:
    """Take in a plan of decode rows: write its `pages` to the page table, then fill `inputs` from its sections.

    payload: int32; of its sections `rows`, `pages`, `segments` and `slices` are read, which must fit into `inputs`.
    last_token: int32, one entry a slot, a column of a table: the rows' tokens. page_table: (slots, pages) int64.
    """
    if payload.is_cuda:
        from manylora.kernels import fill_decode_inputs_triton

        fill = fill_decode_inputs_triton.fill_decode_inputs
    else:
        fill = fill_decode_inputs_reference
    fill(inputs, payload, bounds, last_token, page_table, page_size, dummy_slot)


def fill_decode_inputs_reference(
    inputs: DecodeInputs,
    payload: Tensor,
    bounds: Bounds,
    last_token: Tensor,
    page_table: Tensor,
    page_size: int,
    dummy_slot: int,
) -> None:
    def section(name: str) -> Tensor:
        first, count, width = bounds[name]
        return payload[first : first + count * width].view(count, width).long()

    pages, rows, segments = section("pages"), section("rows"), section("segments")
    page_table[pages[:, 0], pages[:, 1]] = pages[:, 2]
    inputs.rows[: len(rows)] = rows
    inputs.rows[len(rows) :] = torch.tensor([dummy_slot, 0, 0, 0])
    slots, starts, num_new, _ = inputs.rows.unbind(1)
    inputs.token_ids.copy_(last_token[slots])
    inputs.positions.copy_(starts)
    inputs.kv_slots.copy_(page_table[slots, starts // page_size] * page_size + starts % page_size)
    inputs.kv_lens.copy_(starts + num_new)
    inputs.segments[: len(segments)] = segments
    inputs.segments[len(segments) :] = 0
    slices = section("slices").squeeze(1)
    inputs.slices[: len(slices)] = slices
