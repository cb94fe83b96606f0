"""Root-mean-square normalisation, alone and fused with the residual addition before it."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels.addend import Addend


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension. x (…, n) of any strides, weight (n,); returns a new contiguous (…, n).

    Semantics: (x / sqrt(mean(x²) + eps)) in float32, rounded to x's dtype, times weight.
    """
    if x.is_cuda:
        from manylora.kernels import rms_norm_triton

        return rms_norm_triton.rms_norm(x, weight, eps)
    return rms_norm_reference(x, weight, eps)


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, addend: Addend | None = None
) -> Tensor:
    """`residual += x + addend` in place, then `rms_norm(residual, weight, eps)` as a new tensor.

    x and residual (…, n); with an addend (T, n). The sum is taken in float32 and rounded once.
    """
    if x.is_cuda:
        from manylora.kernels import rms_norm_triton

        return rms_norm_triton.fused_add_rms_norm(x, residual, weight, eps, addend)
    return fused_add_rms_norm_reference(x, residual, weight, eps, addend)


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return normed.to(x.dtype) * weight


def fused_add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, addend: Addend | None = None
) -> Tensor:
    if addend is None:
        residual += x
    else:
        residual.copy_(addend.added_to(x) + residual.float())
    return rms_norm_reference(residual, weight, eps)
