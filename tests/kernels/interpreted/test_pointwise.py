"""Norms and the feed-forward gate in Triton against their references."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels import activation_triton, rms_norm_triton
from manylora.kernels.activation import silu_and_mul_reference
from manylora.kernels.addend import Addend
from manylora.kernels.rms_norm import fused_add_rms_norm_reference, rms_norm_reference
from tests.kernels.addends import random_addend

torch.set_num_threads(1)
EPS = 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(48,), (1, 8), (3, 1500), (5, 3, 16), (2, 2, 3, 10), (0, 16)], ids=str)
def test_rms_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = (torch.randn(shape) * 10).to(dtype), torch.randn(shape[-1]).to(dtype)
    normed = rms_norm_triton.rms_norm(x, weight, EPS)
    torch.testing.assert_close(normed, rms_norm_reference(x, weight, EPS))


def test_rms_norm_takes_a_view_of_a_fused_tensor() -> None:
    fused, weight = torch.randn(9, 6, 24), torch.randn(24)
    before = fused.clone()
    for view in (fused[:, 1:4], fused[:, 2], fused.transpose(0, 1), fused.mT.contiguous().mT):
        normed = rms_norm_triton.rms_norm(view, weight, EPS)
        torch.testing.assert_close(normed, rms_norm_reference(view, weight, EPS))
        assert normed.is_contiguous()
    assert torch.equal(fused, before)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(1, 8), (3, 1500), (6, 64)], ids=str)
def test_fused_add_rms_norm(shape: tuple[int, int], dtype: torch.dtype, adds: bool) -> None:
    x, residual = torch.randn(2, *shape).to(dtype)
    weight, total, x_before = torch.randn(shape[-1]).to(dtype), residual.clone(), x.clone()
    addend = random_addend(x) if adds else None
    expected = fused_add_rms_norm_reference(x, total, weight, EPS, addend)
    normed = rms_norm_triton.fused_add_rms_norm(x, residual, weight, EPS, addend)
    torch.testing.assert_close(normed, expected)
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)


def test_what_is_not_implemented_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 16384"):
        rms_norm_triton.rms_norm(torch.ones(1, 16385), torch.ones(16385), EPS)
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm_triton.fused_add_rms_norm(torch.ones(4, 4).T, torch.ones(4, 4), torch.ones(4), EPS)
    with pytest.raises(ValueError, match="contiguous"):
        activation_triton.silu_and_mul(torch.ones(4, 4).T)
    addend = Addend(torch.ones(4, 4).T, torch.ones(4, dtype=torch.int32))
    with pytest.raises(ValueError, match="contiguous rows"):
        activation_triton.silu_and_mul(torch.ones(4, 4), addend)


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("num_tokens", "size"), [(0, 8), (1, 6), (3, 1030)])
def test_silu_and_mul(num_tokens: int, size: int, dtype: torch.dtype, adds: bool) -> None:
    x = (torch.randn(num_tokens, 2 * size + 4) * 5).to(dtype)[:, 4:]
    addend = random_addend(x) if adds else None
    torch.testing.assert_close(activation_triton.silu_and_mul(x, addend), silu_and_mul_reference(x, addend))
