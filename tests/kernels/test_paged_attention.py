"""KV store and paged attention against dense attention, with every unused byte of the cache set to NaN."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.kv_store import kv_store
from manylora.kernels.paged_attention import paged_decode_attention, paged_prefill_attention

torch.set_num_threads(1)

PAGE_SIZE, HEAD_DIM, NUM_PAGES = 4, 8, 40
SCALE = HEAD_DIM**-0.5


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (n, heads, d): the last n of the kv_len positions of k, v (kv_len, kv_heads, d)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * SCALE
    positions = torch.arange(len(k))
    future = positions > positions[len(k) - len(q) :, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


class PagedRows:
    """Rows of given lengths in scattered pages of one layer of a pool; keeps the dense K and V beside them."""

    def __init__(self, kv_lens: list[int], kv_heads: int, dtype: torch.dtype = torch.float32) -> None:
        pool = torch.full((NUM_PAGES, 3, 2, kv_heads, PAGE_SIZE, HEAD_DIM), torch.nan, dtype=dtype)
        self.kv_cache = pool[:, 1]
        self.others = pool[:, ::2]
        pages_of = [-(-n // PAGE_SIZE) for n in kv_lens]
        free = iter(torch.randperm(NUM_PAGES - 1).tolist())  # the last page stays NaN and fills up the table
        self.page_table = torch.full((len(kv_lens), max(pages_of) + 2), NUM_PAGES - 1)
        self.dense: list[tuple[torch.Tensor, torch.Tensor]] = []
        for row, kv_len in enumerate(kv_lens):
            self.page_table[row, : pages_of[row]] = torch.tensor([next(free) for _ in range(pages_of[row])])
            k, v = torch.randn(2, kv_len, kv_heads, HEAD_DIM).to(dtype)
            positions = torch.arange(kv_len)
            slots = self.page_table[row, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE
            kv_store(k, v, self.kv_cache, slots)
            self.dense.append((k, v))


def test_kv_store_writes_its_slots_and_nothing_else() -> None:
    rows = PagedRows([5, 9], kv_heads=2)
    for row, (k, v) in enumerate(rows.dense):
        for position in range(len(k)):
            page, offset = rows.page_table[row, position // PAGE_SIZE], position % PAGE_SIZE
            assert torch.equal(rows.kv_cache[page, 0, :, offset], k[position])
            assert torch.equal(rows.kv_cache[page, 1, :, offset], v[position])
    written = rows.kv_cache.isfinite().sum().item()
    assert written == 2 * 2 * HEAD_DIM * (5 + 9)
    assert rows.others.isnan().all()


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
def test_prefill(heads: int, kv_heads: int) -> None:
    """A whole prompt, a later chunk, a chunk ending at a page's end, and a single token."""
    spans = [(0, 7), (5, 6), (3, 5), (8, 1)]  # (start, num_new)
    rows = PagedRows([start + num_new for start, num_new in spans], kv_heads)
    host_rows, token_offset = [], 0
    for slot, (start, num_new) in enumerate(spans):
        host_rows.append((slot, start, num_new, token_offset))
        token_offset += num_new
    q = torch.randn(token_offset, heads, HEAD_DIM)
    out = torch.full_like(q, torch.nan)

    paged_prefill_attention(
        q, rows.kv_cache, rows.page_table, torch.tensor(host_rows, dtype=torch.int32), SCALE, out
    )

    chunks = q.split([num_new for _, num_new in spans])
    expected = [dense_attention(chunk, *dense) for chunk, dense in zip(chunks, rows.dense, strict=True)]
    torch.testing.assert_close(out, torch.cat(expected))


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("kv_lens", [[1], [4, 1, 13, 8, 5]], ids=str)
def test_decode(kv_lens: list[int], heads: int, kv_heads: int) -> None:
    rows = PagedRows(kv_lens, kv_heads)
    q = torch.randn(len(kv_lens), heads, HEAD_DIM)
    out = torch.full_like(q, torch.nan)
    longest = max(kv_lens) + 1  # a step's prefill rows may be longer than every decode row

    paged_decode_attention(q, rows.kv_cache, rows.page_table, torch.tensor(kv_lens), longest, SCALE, out)

    expected = [dense_attention(q[i : i + 1], *dense) for i, dense in enumerate(rows.dense)]
    torch.testing.assert_close(out, torch.cat(expected))


def test_decode_in_bfloat16() -> None:
    rows = PagedRows([60], kv_heads=1, dtype=torch.bfloat16)
    q = torch.randn(1, 4, HEAD_DIM).bfloat16()
    out = torch.empty_like(q)
    paged_decode_attention(q, rows.kv_cache, rows.page_table, torch.tensor([60]), 60, SCALE, out)
    torch.testing.assert_close(out, dense_attention(q, *rows.dense[0]), rtol=1.6e-2, atol=4e-3)
