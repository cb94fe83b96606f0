"""What is still to be added to a matrix: the kernel that reads the matrix next adds it on the way."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Addend(NamedTuple):
    """values: (T, n) like the matrix, contiguous rows, undefined in rows that have none. has_any: (T,) int32, which rows
    have some: 1 or 0.
    """

    values: Tensor
    has_any: Tensor

    def added_to(self, x: Tensor) -> Tensor:
        """x (T, n) with it, in float32."""
        return x.float() + torch.where(self.has_any.bool()[:, None], self.values.float(), 0.0)
