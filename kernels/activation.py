"""The gate of the feed-forward block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from manylora.kernels.addend import Addend


def silu_and_mul(x: Tensor, addend: Addend | None = None) -> Tensor:
    """silu(gate) · up. x (T, 2·n) plus `addend` holds gate in its first n columns and up in the rest; returns a new (T, n).

    Computed in float32 and rounded once.
    """
    if x.is_cuda:
        from manylora.kernels import activation_triton

        return activation_triton.silu_and_mul(x, addend)
    return silu_and_mul_reference(x, addend)


def silu_and_mul_reference(x: Tensor, addend: Addend | None = None) -> Tensor:
    gate, up = (x if addend is None else addend.added_to(x)).chunk(2, dim=-1)
    return (F.silu(gate.float()) * up).to(x.dtype)
