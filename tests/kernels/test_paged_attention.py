"""KV store and paged attention against dense attention, with every unused byte of the cache set to NaN."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from tests.kernels.paged_rows import PagedRows

torch.set_num_threads(1)

PAGE_SIZE, HEAD_DIM = 4, 8
SCALE = HEAD_DIM**-0.5


def paged_rows(kv_lens: list[int], kv_heads: int, dtype: torch.dtype = torch.float32) -> PagedRows:
    return PagedRows(kv_lens, kv_heads=kv_heads, head_dim=HEAD_DIM, page_size=PAGE_SIZE, dtype=dtype)


def test_kv_store_writes_its_slots_and_nothing_else() -> None:
    rows = paged_rows([5, 9], kv_heads=2)
    for slot, (k, v) in zip(rows.slots, rows.dense, strict=True):
        for position in range(len(k)):
            page, offset = rows.page_table[slot, position // PAGE_SIZE], position % PAGE_SIZE
            assert torch.equal(rows.kv_cache[page, 0, :, offset], k[position])
            assert torch.equal(rows.kv_cache[page, 1, :, offset], v[position])
    written = rows.kv_cache.isfinite().sum().item()
    assert written == 2 * 2 * HEAD_DIM * (5 + 9)
    assert rows.others.isnan().all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_prefill(heads: int, kv_heads: int) -> None:
    """A whole prompt, a later chunk, a chunk ending at a page's end, and a single token."""
    spans = [(0, 7), (5, 6), (3, 5), (8, 1)]
    rows = paged_rows([start + num_new for start, num_new in spans], kv_heads)
    q = torch.randn(sum(num_new for _, num_new in spans), heads, HEAD_DIM)
    out = torch.full_like(q, torch.nan)
    paged_prefill_attention(q, rows.kv_cache, rows.page_table, rows.prefill_rows(spans), SCALE, out)
    torch.testing.assert_close(out, rows.prefill(q, spans))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("kv_lens", [[1], [4, 1, 13, 8, 5]], ids=str)
def test_decode(kv_lens: list[int], heads: int, kv_heads: int) -> None:
    rows = paged_rows(kv_lens, kv_heads)
    q = torch.randn(len(kv_lens), heads, HEAD_DIM)
    out = torch.full_like(q, torch.nan)
    longest = max(kv_lens) + 1  # a step's prefill rows may be longer than every decode row
    paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, longest, SCALE, out)
    torch.testing.assert_close(out, rows.decode(q))


def test_decode_in_bfloat16() -> None:
    rows = paged_rows([60], kv_heads=1, dtype=torch.bfloat16)
    q = torch.randn(1, 4, HEAD_DIM).bfloat16()
    out = torch.empty_like(q)
    paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, 60, SCALE, out)
    torch.testing.assert_close(out, rows.decode(q), rtol=1.6e-2, atol=4e-3)
