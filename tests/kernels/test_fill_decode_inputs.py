"""What a decode graph is given to read, row by row."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.fill_decode_inputs import fill_decode_inputs
from tests.kernels.decode_plans import DUMMY, PAGE_SIZE, DecodePlan, dirty_inputs

torch.set_num_threads(1)


@pytest.mark.parametrize("num_rows", [0, 1, 6, 8])
def test_rows_of_the_step_then_padding(num_rows: int) -> None:
    plan, inputs = DecodePlan(num_rows), dirty_inputs(8, 0)
    fill_decode_inputs(inputs, plan.payload, plan.bounds, plan.last_token, plan.page_table, PAGE_SIZE, DUMMY)
    padding = 8 - num_rows
    slots, starts = plan.slots + padding * [DUMMY], plan.starts + padding * [0]
    new, offsets = num_rows * [1] + padding * [0], [*range(num_rows), *padding * [0]]
    assert inputs.rows.T.tolist() == [slots, starts, new, offsets]
    assert inputs.positions.tolist() == starts
    assert inputs.kv_lens.tolist() == [start + 1 for start in plan.starts] + padding * [0]
    assert inputs.token_ids.tolist() == plan.last_token[slots].tolist()
    for row, (slot, start) in enumerate(zip(plan.slots, plan.starts, strict=True)):
        page, offset = divmod(int(inputs.kv_slots[row]), PAGE_SIZE)
        assert page == plan.page_table[slot, start // PAGE_SIZE]
        assert offset == start % PAGE_SIZE
        assert page == 2000 + row or row % 5 == 0
    dummy_page = int(plan.page_table[DUMMY, 0])
    assert inputs.kv_slots[num_rows:].tolist() == padding * [dummy_page * PAGE_SIZE]


def test_segments_are_padded_with_zeros_and_slices_are_not() -> None:
    plan, inputs = DecodePlan(4, slices_each=2), dirty_inputs(4, 3)
    fill_decode_inputs(inputs, plan.payload, plan.bounds, plan.last_token, plan.page_table, PAGE_SIZE, DUMMY)
    assert inputs.segments.tolist() == [[1, 2, 0, 2], [2, 3, 2, 2], [0] * 4, [0] * 4]
    assert inputs.slices.tolist() == [1, 2, 2, 3, *8 * [77]]
