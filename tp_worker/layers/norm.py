"""RMSNorm with its weight; every rank has all of it."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels.addend import Addend
from manylora.kernels.rms_norm import fused_add_rms_norm, rms_norm
from manylora.tp_worker.layers.shard import Shard, Shards


class RMSNorm:
    """Over the last dimension, of `size` elements."""

    def __init__(self, size: int, eps: float, *, dtype: torch.dtype, device: torch.device) -> None:
        self.weight = torch.empty(size, dtype=dtype, device=device)
        self.eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor, addend: Addend | None = None) -> Tensor:
        """Add x, and what is still to be added to it, to the residual in place, and return the sum normalised."""
        return fused_add_rms_norm(x, residual, self.weight, self.eps, addend)

    def shards(self, name: str) -> Shards:
        yield f"{name}.weight", Shard(self.weight, tuple(self.weight.shape))
