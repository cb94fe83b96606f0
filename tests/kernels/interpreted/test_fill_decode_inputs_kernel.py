"""A decode graph's inputs filled in Triton against the reference: with and without pages, padding and slices."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.decode_inputs import DecodeInputs
from manylora.kernels.fill_decode_inputs import fill_decode_inputs_reference
from manylora.kernels.fill_decode_inputs_triton import fill_decode_inputs
from tests.kernels.decode_plans import DUMMY, PAGE_SIZE, DecodePlan, assert_filled_alike

torch.set_num_threads(1)


@pytest.mark.parametrize("with_pages", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "bucket", "slices_each", "max_slices"),
    [(0, 1, 0, 0), (1, 1, 0, 0), (9, 16, 0, 16), (9, 12, 3, 4), (150, 160, 2, 2), (280, 300, 1, 1)],
)
def test_the_same_inputs(
    num_rows: int, bucket: int, slices_each: int, max_slices: int, with_pages: bool
) -> None:
    plan = DecodePlan(num_rows, with_pages=with_pages, slices_each=slices_each)
    assert_filled_alike(fill_decode_inputs, fill_decode_inputs_reference, plan, bucket, max_slices)


@pytest.mark.parametrize(("bucket", "max_slices"), [(8, 2), (9, 0), (9, 1)])
def test_a_plan_that_does_not_fit_is_refused(bucket: int, max_slices: int) -> None:
    plan = DecodePlan(9, slices_each=2)
    inputs = DecodeInputs.empty(bucket, max_slices, torch.device("cpu"))
    with pytest.raises(ValueError, match="does not fit"):
        fill_decode_inputs(
            inputs, plan.payload, plan.bounds, plan.last_token, plan.page_table, PAGE_SIZE, DUMMY
        )
