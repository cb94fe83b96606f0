"""Rotary embedding and cache writes in Triton against the reference, on views of a fused projection."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.rope_and_store import rope_and_store_reference
from manylora.kernels.rope_and_store_triton import rope_and_store
from tests.kernels.addends import random_addend

torch.set_num_threads(1)
NUM_PAGES, PAGE_SIZE, NUM_POSITIONS = 9, 4, 30


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 16), (3, 3, 64), (6, 1, 24)])
def test_rope_and_store(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, adds: bool) -> None:
    num_tokens = 7
    angles = torch.rand(NUM_POSITIONS, head_dim // 2) * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([0, 29, 5, 5, 6, 7, 1])
    kv_slots = torch.randperm(NUM_PAGES * PAGE_SIZE)[:num_tokens]
    fused = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim).to(dtype)
    addend = random_addend(fused.flatten(1)) if adds else None
    # A page is larger than its KV, as where adapters need larger pages.
    pool = torch.full((NUM_PAGES, 2, 2 * kv_heads * PAGE_SIZE * head_dim + 5), torch.nan, dtype=dtype)

    def run(op) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        own, cache = fused.clone(), pool.clone()
        layer = cache[:, 1, : 2 * kv_heads * PAGE_SIZE * head_dim]
        layer = layer.unflatten(1, (2, kv_heads, PAGE_SIZE, head_dim))
        q, k, v = own.split((heads, kv_heads, kv_heads), dim=1)
        op(q, k, v, cos_sin, positions, layer, kv_slots, addend)
        return q, v, cache

    expected, found = run(rope_and_store_reference), run(rope_and_store)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    assert found[2].isfinite().sum() == num_tokens * 2 * kv_heads * head_dim


def test_other_layouts_are_refused() -> None:
    q = torch.ones(1, 4, 8).mT
    slots = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(ValueError, match="contiguous"):
        rope_and_store(q, q, q, torch.ones(1, 4), slots, torch.ones(1, 2, 8, 4, 4), slots)
