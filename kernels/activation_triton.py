"""The Triton version of `silu_and_mul`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.addend import Addend
from manylora.kernels.addend_triton import addend_arguments, load_more
from manylora.kernels.dependent_launch import let_next_start, overlapping, wait_for_earlier

_BLOCK = 1024


def silu_and_mul(x: Tensor, addend: Addend | None = None) -> Tensor:
    """See `kernels.activation`; x is a matrix whose columns lie next to each other."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(f"silu_and_mul takes a matrix of contiguous rows, not strides {x.stride()}")
    num_tokens, size = x.shape[0], x.shape[1] // 2
    out = torch.empty((num_tokens, size), dtype=x.dtype, device=x.device)
    if num_tokens:
        blocks = triton.cdiv(size, _BLOCK)
        constants: dict[str, Any] = {"SIZE": size, "BLOCKS": blocks, "BLOCK": _BLOCK}
        constants |= {"ADDS": addend is not None, **overlapping(x.device)}
        arguments = [x, x.stride(0), *addend_arguments(addend, x), out]
        _silu_and_mul[(num_tokens * blocks,)](*arguments, **constants)
    return out


@triton.jit
def _silu_and_mul(
    x,
    x_stride,
    more,
    more_stride,
    has_more,
    out,
    SIZE: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = (tl.program_id(0) // BLOCKS).to(tl.int64)
    columns = tl.program_id(0) % BLOCKS * BLOCK + tl.arange(0, BLOCK)
    valid = columns < SIZE
    more_valid = valid
    if ADDS:
        more_valid = columns < SIZE * tl.load(has_more + token)
    wait_for_earlier(OVERLAPS)
    gate = tl.load(x + token * x_stride + columns, mask=valid, other=0.0).to(tl.float32)
    up = tl.load(x + token * x_stride + SIZE + columns, mask=valid, other=0.0).to(tl.float32)
    if ADDS:
        gate += load_more(more + token * more_stride + columns, more_valid)
        up += load_more(more + token * more_stride + SIZE + columns, more_valid)
    let_next_start(OVERLAPS)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out + token * SIZE + columns, product.to(out.dtype.element_ty), mask=valid)
