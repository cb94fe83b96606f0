"""A linear layer's product. With few rows, as in decode steps, it is bound by reading the weight."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """x·weightᵀ + bias. x (T, in), weight (out, in), bias (out,), all of one dtype; returns (T, out), in `out` if given.

    Sums are taken in float32 and rounded once. cuBLAS computes it wherever our kernel is not the faster one.
    """
    if x.is_cuda:
        from manylora.kernels import linear_triton

        if linear_triton.is_faster(x):
            return linear_triton.linear(x, weight, bias, out)
    if out is None:
        return F.linear(x, weight, bias)
    torch.mm(x, weight.t(), out=out)
    return out if bias is None else out.add_(bias)
