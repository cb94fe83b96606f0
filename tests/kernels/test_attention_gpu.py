"""The attention kernels on a CUDA device at real sizes against their references in float32, in caches full of NaN."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from manylora.kernels.paged_attention import (
    paged_decode_attention,
    paged_decode_attention_reference,
    paged_prefill_attention,
    paged_prefill_attention_reference,
)
from tests.kernels.paged_rows import PagedRows, Spans

pytestmark = pytest.mark.gpu

SHAPES = [(32, 8, 128), (28, 4, 128), (8, 8, 64), (16, 1, 96)]  # heads, kv heads, head dim
on_every_shape = pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def plain_reference() -> Iterator[None]:
    """The references without torch's fused attention: torch 2.11's gives wrong values for the last query of 513."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def zipf_lengths(num_rows: int) -> list[int]:
    return [1 + 6000 // (rank + 1) for rank in range(num_rows)]


LENGTHS = {
    "one": [1],
    "one long": [8192],
    "page edges": [15, 16, 17, 63, 64, 65, 127, 128, 129],
    "a batch": [1000 + 37 * i % 180 for i in range(64)],
    "zipf": zipf_lengths(300),
    "many short": [1 + i % 40 for i in range(512)],
    "padded": [700, 0, 0, 90, 1, 0],
}
SPANS: dict[str, Spans] = {
    "one long": [(0, 8192)],
    "prompts": [(0, 1024 - i) for i in range(6)],
    "short prompts": [(0, 200 + i) for i in range(32)],
    "tiny": [(0, 1 + i % 9) for i in range(270)],
    "chunks": [(4000, 700), (64, 64), (63, 2), (1000, 1), (0, 513)],
}


def paged_rows(kv_lens: list[int], kv_heads: int, head_dim: int, dtype: torch.dtype) -> PagedRows:
    return PagedRows(kv_lens, kv_heads=kv_heads, head_dim=head_dim, page_size=16, dtype=dtype, device="cuda")


def queries(num_tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A part of a fused projection."""
    return torch.randn(num_tokens, heads + 2, head_dim, device="cuda").to(dtype)[:, 1:-1]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = (1e-4, 1e-5) if found.dtype == torch.float32 else (1.6e-2, 1e-2)
    torch.testing.assert_close(found.float(), expected, rtol=rtol, atol=atol)


def check_decode(rows: PagedRows, q: torch.Tensor, out: torch.Tensor, longest: int) -> None:
    expected = torch.empty(q.shape, device="cuda")
    paged_decode_attention_reference(
        q.float(),
        rows.kv_cache.float(),
        rows.page_table,
        rows.slots,
        rows.kv_lens,
        longest,
        q.shape[2] ** -0.5,
        expected,
    )
    real = rows.kv_lens > 0
    assert_close(out[real], expected[real])


@in_both_precisions
@on_every_shape
@pytest.mark.parametrize("lengths", LENGTHS)
def test_decode(lengths: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    kv_lens = LENGTHS[lengths]
    rows = paged_rows(kv_lens, kv_heads, head_dim, dtype)
    q = queries(len(kv_lens), heads, head_dim, dtype)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device="cuda")
    paged_decode_attention(
        q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, max(kv_lens), head_dim**-0.5, out
    )
    check_decode(rows, q, out, max(kv_lens))


# Few rows and many: the default launch differs.
@pytest.mark.parametrize("num_rows", [8, 40])
def test_one_graph_serves_any_lengths(num_rows: int) -> None:
    """And draws the same bits as a launch without one, whichever program comes last to a head that is cut."""
    most = [3000, *(1 + 97 * i % 1100 for i in range(num_rows - 1))]
    rows = paged_rows(most, 8, 128, torch.bfloat16)
    q = queries(num_rows, 32, 128, torch.bfloat16)
    out, eager = (torch.empty(q.shape, dtype=q.dtype, device="cuda") for _ in range(2))

    def attend(out: torch.Tensor) -> None:
        paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, 1, 128**-0.5, out)

    attend(out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        attend(out)
    lengths = [[(i * share) // 99 for i in most] for share in range(99, -1, -1)]
    lengths[50] = [1] * num_rows
    for step, shorter in enumerate(lengths):
        rows.kv_lens.copy_(torch.tensor(shorter))
        q.copy_(torch.randn_like(q))
        out.fill_(torch.nan)
        eager.fill_(torch.nan)
        graph.replay()
        attend(eager)
        real = rows.kv_lens > 0
        assert torch.equal(out[real], eager[real])
        if step % 10 == 0:
            check_decode(rows, q, out, 3000)


@pytest.mark.parametrize("lengths", ["zipf", "one long", "a batch"])
def test_decode_draws_the_same_bits_every_time(lengths: str) -> None:
    kv_lens = LENGTHS[lengths]
    rows = paged_rows(kv_lens, 8, 128, torch.bfloat16)
    q = queries(len(kv_lens), 32, 128, torch.bfloat16)
    results = []
    for _ in range(100):
        out = torch.full(q.shape, torch.nan, dtype=q.dtype, device="cuda")
        paged_decode_attention(
            q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, max(kv_lens), 128**-0.5, out
        )
        results.append(out)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_decode_is_not_captured_before_it_ran_once() -> None:
    rows = paged_rows([40], 1, 16, torch.bfloat16)
    q = queries(1, 17, 16, torch.bfloat16)  # a group that no other test has
    out = torch.empty(q.shape, dtype=q.dtype, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        out.zero_()  # torch warns of a graph of nothing
        with pytest.raises(RuntimeError, match="captured"):
            paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, 40, 0.25, out)


@in_both_precisions
@on_every_shape
@pytest.mark.parametrize("spans", SPANS)
def test_prefill(spans: str, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    of_rows = SPANS[spans]
    rows = paged_rows([start + num_new for start, num_new in of_rows], kv_heads, head_dim, dtype)
    q = queries(sum(num_new for _, num_new in of_rows), heads, head_dim, dtype)
    out = torch.full(q.shape, torch.nan, dtype=dtype, device="cuda")
    entries = rows.prefill_rows(of_rows)
    paged_prefill_attention(q, rows.kv_cache, rows.page_table, entries, head_dim**-0.5, out)
    expected = torch.empty(q.shape, device="cuda")
    paged_prefill_attention_reference(
        q.float().contiguous(), rows.kv_cache.float(), rows.page_table, entries, head_dim**-0.5, expected
    )
    assert_close(out, expected)
