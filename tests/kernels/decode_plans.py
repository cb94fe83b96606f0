"""Plans of decode rows as their packed sections, and the tables they meet, for `fill_decode_inputs`."""

from __future__ import annotations

import torch

from manylora.kernels.decode_inputs import DecodeInputs
from manylora.runtime.plan import PlanBuilder, section_bounds

NUM_SLOTS, MAX_PAGES, PAGE_SIZE = 300, 7, 4
DUMMY = NUM_SLOTS


class DecodePlan:
    """`num_rows` rows at random places; `with_pages`: most of them with a page that only this plan brings."""

    def __init__(
        self, num_rows: int, *, with_pages: bool = True, slices_each: int = 0, device: str = "cpu"
    ) -> None:
        generator = torch.Generator().manual_seed(num_rows)
        table = torch.randint(1000, (NUM_SLOTS + 1, MAX_PAGES), generator=generator)
        entries = torch.randint(32000, (NUM_SLOTS + 1, 16), generator=generator, dtype=torch.int32)
        builder = PlanBuilder()
        builder.add("copies", 1, 2)  # so that sections begin anywhere
        starts = torch.randint(MAX_PAGES * PAGE_SIZE, (num_rows,), generator=generator).tolist()
        slots = torch.randperm(NUM_SLOTS, generator=generator).tolist()[:num_rows]
        for row, (slot, start) in enumerate(zip(slots, starts, strict=True)):
            builder.add("rows", slot, start, 1, row)
            builder.add("tokens", -1)
            if with_pages and row % 5:
                builder.add("pages", slot, start // PAGE_SIZE, 2000 + row)
            if slices_each and row % 3:
                builder.add("segments", row, row + 1, builder.count("slices"), slices_each)
                builder.extend("slices", range(row, row + slices_each))
        plan = builder.build(1, num_prefill_rows=0, num_prefill_tokens=0, max_kv_len=30)
        self.slots, self.starts = slots, starts
        self.payload = torch.frombuffer(bytearray(plan.payload), dtype=torch.int32).to(device)
        self.bounds = section_bounds(plan.counts)
        self.page_table = table.to(device)
        self.last_token = entries.to(device)[:, 13]


def dirty_inputs(bucket: int, max_slices: int, device: str = "cpu") -> DecodeInputs:
    """As another step left them."""
    inputs = DecodeInputs.empty(bucket, max_slices, torch.device(device))
    for name in DecodeInputs.__slots__:
        getattr(inputs, name).fill_(77)
    return inputs


def assert_filled_alike(fill, other, plan: DecodePlan, bucket: int, max_slices: int) -> None:
    """`fill` and `other` (both as `fill_decode_inputs`) leave the same in all they write."""
    device = plan.payload.device.type
    results = []
    for each in (fill, other):
        inputs, table = dirty_inputs(bucket, max_slices, device), plan.page_table.clone()
        each(inputs, plan.payload, plan.bounds, plan.last_token, table, PAGE_SIZE, DUMMY)
        results.append((*(getattr(inputs, name) for name in DecodeInputs.__slots__), table))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
