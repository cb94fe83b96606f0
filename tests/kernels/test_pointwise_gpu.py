"""Norms, gate and rotary embedding on a CUDA device at real sizes against their references."""

from __future__ import annotations

import pytest
import torch
from triton import knobs

from manylora.kernels.activation import silu_and_mul, silu_and_mul_reference
from manylora.kernels.compilation import report_compilations
from manylora.kernels.linear import linear
from manylora.kernels.linear_triton import is_faster
from manylora.kernels.rms_norm import (
    fused_add_rms_norm,
    fused_add_rms_norm_reference,
    rms_norm,
    rms_norm_reference,
)
from manylora.kernels.rope_and_store import rope_and_store, rope_and_store_reference
from tests.kernels.addends import random_addend

pytestmark = pytest.mark.gpu

for_every_size = pytest.mark.parametrize("num_tokens", [0, 1, 77, 8192])
adding_or_not = pytest.mark.parametrize("adds", [False, True])
in_both_precisions = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@in_both_precisions
@for_every_size
@pytest.mark.parametrize("size", [128, 4096, 5000, 16384])
def test_norms(size: int, num_tokens: int, dtype: torch.dtype) -> None:
    x, residual = torch.randn(2, num_tokens, size, device="cuda").to(dtype)
    weight = torch.randn(size, device="cuda").to(dtype)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5))
    for addend in (None, random_addend(x)):
        total = residual.clone()
        found = residual.clone()
        expected = fused_add_rms_norm_reference(x, total, weight, 1e-5, addend)
        torch.testing.assert_close(fused_add_rms_norm(x, found, weight, 1e-5, addend), expected)
        assert torch.equal(found, total)


def test_norm_of_the_heads_of_a_fused_projection() -> None:
    fused = torch.randn(300, 48, 128, device="cuda").bfloat16()
    weight = torch.randn(128, device="cuda").bfloat16()
    for heads in fused.split((32, 8, 8), dim=1):
        torch.testing.assert_close(rms_norm(heads, weight, 1e-6), rms_norm_reference(heads, weight, 1e-6))


@adding_or_not
@in_both_precisions
@for_every_size
@pytest.mark.parametrize("size", [14336, 6001])
def test_silu_and_mul(size: int, num_tokens: int, dtype: torch.dtype, adds: bool) -> None:
    x = torch.randn(num_tokens, 2 * size, device="cuda").to(dtype) * 4
    addend = random_addend(x) if adds else None
    torch.testing.assert_close(silu_and_mul(x, addend), silu_and_mul_reference(x, addend))


@adding_or_not
@in_both_precisions
@pytest.mark.parametrize("num_tokens", [1, 77, 8192])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(32, 8, 128), (28, 4, 128), (14, 2, 64), (5, 1, 96)]
)
def test_rope_and_store(
    heads: int, kv_heads: int, head_dim: int, num_tokens: int, dtype: torch.dtype, adds: bool
) -> None:
    page_size, num_positions = 16, 9000
    num_pages = num_tokens // page_size + 3
    angles = torch.rand(num_positions, head_dim // 2, device="cuda") * 6
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.randint(num_positions, (num_tokens,), device="cuda")
    kv_slots = torch.randperm(num_pages * page_size, device="cuda")[:num_tokens]
    fused = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim, device="cuda").to(dtype)
    addend = random_addend(fused.flatten(1)) if adds else None
    results = []
    for op in (rope_and_store, rope_and_store_reference):
        own = fused.clone()
        pool = torch.full(
            (num_pages, 2, 2, kv_heads, page_size, head_dim), torch.nan, dtype=dtype, device="cuda"
        )
        q, k, v = own.split((heads, kv_heads, kv_heads), dim=1)
        op(q, k, v, cos_sin, positions, pool[:, 1], kv_slots, addend)
        results.append((q, v, pool))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("num_rows", [1, 8, 17, 33, 64])
@pytest.mark.parametrize(
    ("out", "features"), [(6144, 4096), (4096, 14336), (28672, 4096), (1000, 328), (96, 64)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(with_bias: bool, out: int, features: int, num_rows: int) -> None:
    """Replayed as a chain, in which each product starts before the kernel that writes its input has ended."""
    x, bias = (
        torch.randn(num_rows, features, device="cuda").bfloat16(),
        torch.randn(out, device="cuda").bfloat16(),
    )
    weight = (torch.randn(out, features, device="cuda") / features**0.5).bfloat16()
    assert is_faster(x)
    graph = torch.cuda.CUDAGraph()
    linear(silu_and_mul(x.repeat(1, 2)), weight, bias if with_bias else None)
    with torch.cuda.graph(graph):
        gated = silu_and_mul(x.repeat(1, 2))
        y = linear(gated, weight, bias if with_bias else None)
    for _ in range(3):
        x.copy_(torch.randn(num_rows, features))
        graph.replay()
        expected = silu_and_mul_reference(x.repeat(1, 2)).double() @ weight.double().T + (
            bias if with_bias else 0
        )
        torch.testing.assert_close(y.double(), expected, rtol=1e-2, atol=1e-2)


def test_a_late_compilation_is_reported_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a size of rows that no other test has."""
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    reported: list[str] = []
    report_compilations(reported.append)
    x, weight = torch.randn(3, 1000, device="cuda"), torch.randn(1000, device="cuda")
    for _ in range(2):
        rms_norm(x, weight, 1e-5)
    assert ["_rms_norm" in name for name in reported] == [True]
