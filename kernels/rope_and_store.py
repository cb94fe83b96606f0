"""Rotary position embedding fused with the write of K and V into the paged cache: what a layer does before attention."""

from __future__ import annotations

from torch import Tensor

from manylora.kernels.kv_store import kv_store
from manylora.kernels.rotary import rotary_embedding


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, positions: Tensor, kv_cache: Tensor, kv_slots: Tensor
) -> None:
    """Rotate q in place, and write the rotated k, and v, to the cache. What k holds afterwards is undefined.

    q (T, heads, d), k and v (T, kv_heads, d), with the last dimension contiguous, usually views of the fused projection;
    cos_sin and positions as in `rotary_embedding`; kv_cache and kv_slots as in `kv_store`.
    """
    if q.is_cuda:
        from manylora.kernels import rope_and_store_triton

        rope_and_store_triton.rope_and_store(q, k, v, cos_sin, positions, kv_cache, kv_slots)
    else:
        rope_and_store_reference(q, k, v, cos_sin, positions, kv_cache, kv_slots)


def rope_and_store_reference(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, positions: Tensor, kv_cache: Tensor, kv_slots: Tensor
) -> None:
    rotary_embedding(q, k, cos_sin, positions)
    kv_store(k, v, kv_cache, kv_slots)
