"""The Triton attention kernels against dense attention, with every unused byte of the cache set to NaN."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch

from manylora.kernels.paged_decode_triton import Launch as DecodeLaunch
from manylora.kernels.paged_decode_triton import paged_decode_attention
from manylora.kernels.paged_prefill_triton import paged_prefill_attention
from tests.kernels.paged_rows import PagedRows, Spans

torch.set_num_threads(1)

SHAPES = [(4, 4, 64), (4, 1, 128), (8, 1, 64), (6, 2, 24), (7, 1, 16)]  # heads, kv heads, head dim
LENGTHS = {
    "one": [1],
    "page edges": [15, 16, 17, 31, 32, 33, 64],
    "skewed": [1, 300, 2, 3],
    "equal": [40] * 6,
    "with padding": [0, 33, 0, 0, 70, 0],
}
SPANS: dict[str, Spans] = {
    "short prompts": [(0, 1), (0, 5), (0, 16), (0, 2)],
    "a long one": [(0, 97)],
    "chunks": [(32, 32), (31, 3), (1, 40), (70, 1)],
    "mixed": [(0, 3), (64, 33), (0, 50), (63, 1)],
}


def in_some_shapes(names: Iterable[str]) -> list[tuple[str, tuple[int, int, int]]]:
    """Each name in two of the shapes, so that each shape is met: the whole product takes minutes here."""
    return [(name, SHAPES[(2 * index + k) % len(SHAPES)]) for index, name in enumerate(names) for k in (0, 1)]


def assert_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    rtol, atol = (1e-5, 1e-5) if found.dtype == torch.float32 else (4e-3, 2e-3)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("lengths", "shape"), in_some_shapes(LENGTHS))
def test_decode(lengths: str, shape: tuple[int, int, int]) -> None:
    kv_lens, (heads, kv_heads, head_dim) = LENGTHS[lengths], shape
    rows = PagedRows(kv_lens, kv_heads=kv_heads, head_dim=head_dim, page_size=16)
    # Strided, as a part of the fused projection is.
    q = torch.randn(len(kv_lens), heads + 2, head_dim)[:, 1:-1]
    out = torch.full((len(kv_lens), heads, head_dim), torch.nan)
    paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, head_dim**-0.5, out)
    real = rows.kv_lens > 0
    assert_close(out[real], rows.decode(q)[real])


@pytest.mark.parametrize("programs", [1, 2, 7, 40])
def test_decode_is_right_wherever_the_work_is_cut(programs: int) -> None:
    rows = PagedRows([50, 1, 129, 16], kv_heads=2, head_dim=16, page_size=4, dtype=torch.float16)
    q = torch.randn(4, 4, 16).half()
    out = torch.full_like(q, torch.nan)
    launch = DecodeLaunch(programs, block_n=16, num_warps=4, num_stages=1)
    slots = torch.stack((rows.slots, rows.kv_lens), 1)[:, 0]  # a column of a table, as the plan's rows are
    paged_decode_attention(q, rows.kv_cache, rows.page_table, slots, rows.kv_lens, 0.25, out, launch)
    assert_close(out, rows.decode(q))


@pytest.mark.parametrize("programs", [3, 5, 23])
def test_decode_leaves_its_workspace_as_the_next_one_needs_it(programs: int) -> None:
    """Each length in turn cuts other heads into other numbers of parts."""
    rows = PagedRows([50, 1, 129, 16], kv_heads=2, head_dim=16, page_size=4)
    q = torch.randn(4, 4, 16)
    launch = DecodeLaunch(programs, block_n=16, num_warps=4, num_stages=1)
    whole = DecodeLaunch(1, block_n=16, num_warps=4, num_stages=1)  # cuts nothing
    for lengths in ([50, 1, 129, 16], [1, 1, 128, 0], [0, 0, 1, 0], [50, 1, 0, 3], [50, 1, 129, 16]):
        kv_lens = torch.tensor(lengths)
        out, expected = torch.full_like(q, torch.nan), torch.full_like(q, torch.nan)
        paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, kv_lens, 0.25, out, launch)
        paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, kv_lens, 0.25, expected, whole)
        assert_close(out[kv_lens > 0], expected[kv_lens > 0])


def test_decode_scores_that_exponentials_cannot_hold() -> None:
    rows = PagedRows([90], kv_heads=1, head_dim=16, page_size=16)
    q = torch.randn(1, 2, 16) * 1e4
    out = torch.empty_like(q)
    paged_decode_attention(q, rows.kv_cache, rows.page_table, rows.slots, rows.kv_lens, 0.25, out)
    torch.testing.assert_close(out, rows.decode(q))


@pytest.mark.parametrize(("spans", "shape"), in_some_shapes(SPANS))
def test_prefill(spans: str, shape: tuple[int, int, int]) -> None:
    check_prefill(SPANS[spans], shape, page_size=16, dtype=torch.float32)


def test_prefill_in_half_precision_and_small_pages() -> None:
    check_prefill([(5, 20), (0, 33)], (4, 2, 16), page_size=4, dtype=torch.float16)


def check_prefill(spans: Spans, shape: tuple[int, int, int], page_size: int, dtype: torch.dtype) -> None:
    heads, kv_heads, head_dim = shape
    kv_lens = [start + num_new for start, num_new in spans]
    rows = PagedRows(kv_lens, kv_heads=kv_heads, head_dim=head_dim, page_size=page_size, dtype=dtype)
    num_tokens = sum(num_new for _, num_new in spans)
    q = torch.randn(num_tokens, heads + 2, head_dim).to(dtype)[:, 1:-1]
    out = torch.full((num_tokens, heads, head_dim), torch.nan, dtype=dtype)
    paged_prefill_attention(q, rows.kv_cache, rows.page_table, rows.prefill_rows(spans), head_dim**-0.5, out)
    assert_close(out, rows.prefill(q, spans))
