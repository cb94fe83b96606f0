"""The gate of the feed-forward block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def silu_and_mul(x: Tensor) -> Tensor:
    """silu(gate) · up. x (T, 2·n) holds gate in its first n columns and up in the rest; returns a new (T, n).

    Computed in float32 and rounded once.
    """
    if x.is_cuda:
        from manylora.kernels import activation_triton

        return activation_triton.silu_and_mul(x)
    return silu_and_mul_reference(x)


def silu_and_mul_reference(x: Tensor) -> Tensor:
    gate, up = x.chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(x.dtype)
