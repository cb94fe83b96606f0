"""Rows of given lengths in scattered pages of one layer of a pool, and the dense attention they are compared with."""

from __future__ import annotations

import torch

from manylora.kernels.kv_store import kv_store

Spans = list[tuple[int, int]]  # of prefill rows: start, num_new


def dense_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (n, heads, d): the last n of the kv_len positions of k, v (kv_len, kv_heads, d)."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1).double() for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q.double(), k) * q.shape[2] ** -0.5
    positions = torch.arange(len(k), device=q.device)
    future = positions > positions[len(k) - len(q) :, None]
    weights = scores.masked_fill(future, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)


class PagedRows:
    """Random K and V of every row in a pool whose every other byte is NaN; keeps the dense K and V beside them.

    kv_cache: the layer, with a page stride larger than its KV. page_table and slots: rows lie at random slots of the
    table, whose unused entries name a page of NaN. others: all of the pool that is not the layer.
    """

    def __init__(
        self,
        kv_lens: list[int],
        *,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        dtype: torch.dtype = torch.float32,
        device: str = "cpu",
    ) -> None:
        pages_of = [-(-n // page_size) for n in kv_lens]
        num_pages, num_slots = sum(pages_of) + 1, len(kv_lens) + 3
        shape = (num_pages, 3, 2, kv_heads, page_size, head_dim)
        pool = torch.full(shape, torch.nan, dtype=dtype, device=device)
        self.kv_cache, self.others = pool[:, 1], pool[:, ::2]
        table = torch.full((num_slots, max(pages_of) + 2), num_pages - 1)
        self.slots = torch.randperm(num_slots)[: len(kv_lens)].to(device)
        self.kv_lens = torch.tensor(kv_lens, device=device)
        self.dense: list[tuple[torch.Tensor, torch.Tensor]] = []
        free = torch.randperm(num_pages - 1)
        for slot, kv_len, pages in zip(self.slots.tolist(), kv_lens, free.split(pages_of), strict=False):
            table[slot, : len(pages)] = pages
            k, v = torch.randn(2, kv_len, kv_heads, head_dim, device=device).to(dtype)
            positions = torch.arange(kv_len)
            places = pages[positions // page_size] * page_size + positions % page_size
            kv_store(k, v, self.kv_cache, places.to(device))
            self.dense.append((k, v))
        self.page_table = table.to(device)

    def decode(self, q: torch.Tensor) -> torch.Tensor:
        """What attention of one token a row should give; rows of length 0 stay NaN."""
        expected = torch.full_like(q, torch.nan)
        for row, (k, v) in enumerate(self.dense):
            if len(k):
                expected[row] = dense_attention(q[row : row + 1], k, v)[0]
        return expected

    def prefill(self, q: torch.Tensor, spans: Spans) -> torch.Tensor:
        """What attention of the last `num_new` tokens of each row should give."""
        chunks = q.split([num_new for _, num_new in spans])
        pairs = zip(chunks, self.dense, strict=True)
        return torch.cat([dense_attention(chunk, *dense) for chunk, dense in pairs])

    def prefill_rows(self, spans: Spans) -> torch.Tensor:
        """(R, 4) int32: slot, start, num_new, token_offset."""
        rows, token_offset = [], 0
        for slot, (start, num_new) in zip(self.slots.tolist(), spans, strict=True):
            rows.append((slot, start, num_new, token_offset))
            token_offset += num_new
        return torch.tensor(rows, dtype=torch.int32, device=self.slots.device)
