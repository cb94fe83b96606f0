"""Causal grouped-query attention over a paged KV cache, for prompts (prefill) and for single tokens (decode).

The cache of one layer is (pages, 2, kv_heads, page_size, d), K before V, any strides but the last. Query head h reads
KV head h // (heads / kv_heads). A row's pages are in `page_table` (slots, max_pages) int64 at its slot; entries past
its length are some valid page. Scores, softmax and the weighted sum accumulate in float32. Memory past a row's length
may hold anything, NaN included, and never reaches a result.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


def paged_prefill_attention(
    q: Tensor, kv_cache: Tensor, page_table: Tensor, rows: Tensor, scale: float, out: Tensor
) -> None:
    """Attend rows of several tokens each, whose K and V are in the cache already.

    q, out (T, heads, d); rows (R, 4) of integers on q's device: slot, start, num_new, token_offset. The i-th token of a
    row attends to the row's positions 0 … start + i.
    """
    if q.is_cuda:
        from manylora.kernels import paged_prefill_triton

        paged_prefill_triton.paged_prefill_attention(q, kv_cache, page_table, rows, scale, out)
    else:
        paged_prefill_attention_reference(q, kv_cache, page_table, rows, scale, out)


def paged_decode_attention(
    q: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    kv_lens: Tensor,
    max_kv_len: int,
    scale: float,
    out: Tensor,
) -> None:
    """Attend one token a row to all of the row's kv_lens positions, its own included.

    q, out (R, heads, d); slots, kv_lens (R,) int64; max_kv_len ≥ all kv_lens, on the host: the reference's bound, without
    effect on the result. A row of length 0 costs nothing, and what `out` holds of it is undefined.
    """
    if q.is_cuda:
        from manylora.kernels import paged_decode_triton

        paged_decode_triton.paged_decode_attention(q, kv_cache, page_table, slots, kv_lens, scale, out)
    else:
        paged_decode_attention_reference(q, kv_cache, page_table, slots, kv_lens, max_kv_len, scale, out)


def paged_prefill_attention_reference(
    q: Tensor, kv_cache: Tensor, page_table: Tensor, rows: Tensor, scale: float, out: Tensor
) -> None:
    heads, head_dim = q.shape[1:]
    kv_heads, page_size = kv_cache.shape[2:4]
    for slot, start, num_new, first in rows.tolist():
        kv_len = start + num_new
        pages = page_table[slot, : -(-kv_len // page_size)]
        # (pages, 2, kv_heads, page_size, d) -> (2, kv_heads, 1, kv_len, d), the 1 for the group of query heads
        kv = kv_cache[pages].permute(1, 2, 0, 3, 4).reshape(2, kv_heads, 1, -1, head_dim)[:, :, :, :kv_len]
        k, v = kv.expand(-1, -1, heads // kv_heads, -1, -1)
        row_q = q[first : first + num_new].view(num_new, kv_heads, -1, head_dim).permute(1, 2, 0, 3)
        mask = _causal_mask(start, num_new, q.device)
        attended = scaled_dot_product_attention(row_q, k, v, attn_mask=mask, scale=scale)
        out[first : first + num_new] = attended.permute(2, 0, 1, 3).reshape(num_new, heads, head_dim)


def paged_decode_attention_reference(
    q: Tensor,
    kv_cache: Tensor,
    page_table: Tensor,
    slots: Tensor,
    kv_lens: Tensor,
    max_kv_len: int,
    scale: float,
    out: Tensor,
) -> None:
    num_rows, heads, head_dim = q.shape
    kv_heads, page_size = kv_cache.shape[2:4]
    pages = page_table[slots, : -(-max_kv_len // page_size)]
    kv = kv_cache[pages]  # (R, pages, 2, kv_heads, page_size, d)
    kv = kv.permute(2, 0, 3, 1, 4, 5).reshape(2, num_rows, kv_heads, -1, head_dim)
    in_row = torch.arange(kv.shape[3], device=q.device) < kv_lens[:, None]
    # A masked score is no protection from NaN: 0 · NaN is NaN.
    k, v = kv.masked_fill_(~in_row[:, None, :, None], 0.0)
    grouped_q = q.view(num_rows, kv_heads, heads // kv_heads, head_dim)
    attended = scaled_dot_product_attention(grouped_q, k, v, attn_mask=in_row[:, None, None, :], scale=scale)
    out.copy_(attended.reshape(num_rows, heads, head_dim))


def _causal_mask(start: int, num_new: int, device: torch.device) -> Tensor:
    """(num_new, start + num_new) bool: token i sees positions up to start + i."""
    seen = torch.ones((num_new, start + num_new), dtype=torch.bool, device=device)
    return seen.tril_(diagonal=start)
