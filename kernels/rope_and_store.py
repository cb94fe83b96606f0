"""Rotary position embedding fused with the write of K and V into the paged cache: what a layer does before attention."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels.addend import Addend
from manylora.kernels.kv_store import kv_store
from manylora.kernels.rotary import rotary_embedding


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_cache: Tensor,
    kv_slots: Tensor,
    addend: Addend | None = None,
) -> None:
    """Rotate q in place, and write the rotated k, and v, to the cache. What k holds afterwards is undefined.

    q (T, heads, d), k and v (T, kv_heads, d), with the last dimension contiguous, usually views of the fused projection;
    cos_sin and positions as in `rotary_embedding`; kv_cache and kv_slots as in `kv_store`. addend: of (T, all heads of q,
    then of k, then of v); it is added first, in float32.
    """
    if q.is_cuda:
        from manylora.kernels import rope_and_store_triton

        rope_and_store_triton.rope_and_store(q, k, v, cos_sin, positions, kv_cache, kv_slots, addend)
    else:
        rope_and_store_reference(q, k, v, cos_sin, positions, kv_cache, kv_slots, addend)


def rope_and_store_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_cache: Tensor,
    kv_slots: Tensor,
    addend: Addend | None = None,
) -> None:
    if addend is not None:
        whole = addend.added_to(torch.cat([x.flatten(1) for x in (q, k, v)], dim=1)).unflatten(
            1, (-1, q.shape[2])
        )
        wide_q, k, v = whole.split((q.shape[1], k.shape[1], v.shape[1]), dim=1)
        rotary_embedding(wide_q, k, cos_sin, positions)
        q.copy_(wide_q)
        kv_store(k.to(q.dtype), v.to(q.dtype), kv_cache, kv_slots)
        return
    rotary_embedding(q, k, cos_sin, positions)
    kv_store(k, v, kv_cache, kv_slots)
