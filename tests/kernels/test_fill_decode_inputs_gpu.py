"""A decode graph's inputs filled on a CUDA device, without compiling anew for other sizes."""

from __future__ import annotations

import pytest

from manylora.kernels.fill_decode_inputs import fill_decode_inputs, fill_decode_inputs_reference
from tests.kernels.decode_plans import DecodePlan, assert_filled_alike

pytestmark = pytest.mark.gpu


def on_host(inputs, payload, bounds, last_token, page_table, page_size: int, dummy_slot: int) -> None:
    """The reference, on copies that are brought back."""
    fields = ("rows", "token_ids", "positions", "kv_slots", "kv_lens", "segments", "slices")
    host = type(inputs)(*(getattr(inputs, name).cpu() for name in fields))
    table = page_table.cpu()
    fill_decode_inputs_reference(host, payload.cpu(), bounds, last_token.cpu(), table, page_size, dummy_slot)
    for name in fields:
        getattr(inputs, name).copy_(getattr(host, name))
    page_table.copy_(table)


@pytest.mark.parametrize("with_pages", [True, False])
@pytest.mark.parametrize(
    ("num_rows", "bucket", "slices_each", "max_slices"),
    [(0, 1, 0, 0), (1, 1, 1, 1), (9, 16, 0, 16), (9, 12, 3, 4), (280, 300, 1, 16), (256, 256, 16, 16)],
)
def test_the_same_inputs(
    num_rows: int, bucket: int, slices_each: int, max_slices: int, with_pages: bool
) -> None:
    plan = DecodePlan(num_rows, with_pages=with_pages, slices_each=slices_each, device="cuda")
    assert_filled_alike(fill_decode_inputs, on_host, plan, bucket, max_slices)
