"""What the kernels share that take an `Addend`."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.addend import Addend


def addend_arguments(addend: Addend | None, x: Tensor) -> list[Any]:
    """`more`, its row stride and `has_more` of a launch with the constant ADDS; without an addend x stands in for both."""
    if addend is None:
        return [x, 0, x]
    values, has_any = addend
    if values.stride(1) != 1 or not has_any.is_contiguous():
        raise ValueError(f"an addend has contiguous rows, not strides {values.stride()}")
    return [values, values.stride(0), has_any]


@triton.jit
def load_more(at, known):
    """float32; zero where it is not known. `has_more` may be read before this kernel waits, `more` only after."""
    return tl.load(at, mask=known, other=0.0).to(tl.float32)
