"""Writing keys and values into the paged cache: the reference half of `rope_and_store`."""

from __future__ import annotations

from torch import Tensor


def kv_store(k: Tensor, v: Tensor, kv_cache: Tensor, kv_slots: Tensor) -> None:
    """Write every token's K and V to its slot.

    k, v (T, kv_heads, d), any strides; kv_cache (pages, 2, kv_heads, page_size, d), one layer's view of the pool;
    kv_slots (T,) int64, page · page_size + offset in the page, no two alike.
    """
    page_size = kv_cache.shape[3]
    pages, offsets = kv_slots // page_size, kv_slots % page_size
    kv_cache[pages, 0, :, offsets] = k
    kv_cache[pages, 1, :, offsets] = v
