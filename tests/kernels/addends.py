"""Addends for tests: NaN in the rows that have none."""

from __future__ import annotations

import torch

from manylora.kernels.addend import Addend


def random_addend(x: torch.Tensor) -> Addend:
    """For x (T, n): about half of the rows have some."""
    has_any = torch.randint(2, (len(x),), device=x.device, dtype=torch.int32)
    values = torch.randn(x.shape, device=x.device).to(x.dtype)
    values[has_any == 0] = torch.nan
    return Addend(values, has_any)
