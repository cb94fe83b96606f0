"""The pointwise ops against the textbook formulas, on contiguous and strided tensors."""

from __future__ import annotations

import math

import pytest
import torch

from manylora.kernels.activation import silu_and_mul
from manylora.kernels.addend import Addend
from manylora.kernels.rms_norm import fused_add_rms_norm, rms_norm
from manylora.kernels.rotary import rotary_embedding

torch.set_num_threads(1)


def _dense_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return x / torch.sqrt((x**2).mean(-1, keepdim=True) + eps) * weight


@pytest.mark.parametrize("shape", [(1, 8), (5, 3, 16)])
def test_rms_norm(shape: tuple[int, ...]) -> None:
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), _dense_norm(x, weight, 1e-5))


def test_rms_norm_takes_a_view_of_a_fused_tensor() -> None:
    fused = torch.randn(4, 6, 8)
    heads, weight = fused[:, 1:3], torch.randn(8)
    before = fused.clone()
    normed = rms_norm(heads, weight, 1e-5)
    torch.testing.assert_close(normed, _dense_norm(heads, weight, 1e-5))
    assert normed.is_contiguous()
    assert torch.equal(fused, before)


def test_rms_norm_rounds_bfloat16_only_at_the_end_of_the_norm() -> None:
    x, weight = torch.randn(3, 512).bfloat16() * 100, torch.ones(512, dtype=torch.bfloat16)
    expected = _dense_norm(x.double(), weight.double(), 1e-5).bfloat16()
    assert torch.equal(rms_norm(x, weight, 1e-5), expected)


def test_fused_add_rms_norm_updates_the_residual_and_leaves_x() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)
    total, x_before = x + residual, x.clone()
    normed = fused_add_rms_norm(x, residual, weight, 1e-6)
    torch.testing.assert_close(normed, _dense_norm(total, weight, 1e-6))
    assert torch.equal(residual, total)
    assert torch.equal(x, x_before)


def test_silu_and_mul() -> None:
    x = torch.randn(5, 12)
    gate, up = x[:, :6], x[:, 6:]
    torch.testing.assert_close(silu_and_mul(x), gate / (1 + torch.exp(-gate)) * up)


def test_an_addend_is_added_first() -> None:
    x, residual, weight = torch.randn(4, 8), torch.randn(4, 8), torch.randn(8)
    values = torch.randn(4, 8)
    addend = Addend(values.clone(), torch.tensor([1, 0, 0, 1], dtype=torch.int32))
    addend.values[1:3] = torch.nan
    sums = torch.stack([x[0] + values[0], x[1], x[2], x[3] + values[3]])
    torch.testing.assert_close(silu_and_mul(x, addend), silu_and_mul(sums))
    total = residual + sums
    normed = fused_add_rms_norm(x, residual, weight, 1e-6, addend)
    torch.testing.assert_close(normed, _dense_norm(total, weight, 1e-6))
    torch.testing.assert_close(residual, total)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    """As complex numbers: element j and j + d/2 are one number, turned by position · frequency_j."""
    num_tokens, head_dim = 7, 8
    frequencies = torch.rand(head_dim // 2)
    angles = torch.outer(torch.arange(50.0), frequencies)
    cos_sin = torch.cat((angles.cos(), angles.sin()), -1)
    positions = torch.tensor([0, 1, 2, 49, 3, 3, 17])
    fused = torch.randn(num_tokens, 6, head_dim)
    before = fused.clone()
    q, k, v = fused.split((3, 2, 1), dim=1)

    rotary_embedding(q, k, cos_sin, positions)

    numbers = torch.complex(before[..., :4], before[..., 4:])
    turns = torch.polar(torch.ones(num_tokens, 1, 4), positions[:, None, None] * frequencies)
    turned = numbers * turns
    expected = torch.cat((turned.real, turned.imag), -1)
    torch.testing.assert_close(fused[:, :5], expected[:, :5])
    assert torch.equal(v, before[:, 5:])
    assert math.isclose(q[3].norm().item(), before[3, :3].norm().item(), rel_tol=1e-5)
