"""The Triton version of `linear` for few rows: every program streams some rows of the weight once.

It reaches the bandwidth that cuBLAS reaches and, unlike it, takes part in dependent launches: the first tiles of the
weight are on their way to the L2 cache before the kernel that writes x has ended.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.dependent_launch import (
    let_next_start,
    overlapping,
    prefetch_to_l2,
    wait_for_earlier,
)
from manylora.kernels.gpu import HOPPER, capability, multiprocessors

MAX_ROWS = 64
_PREFETCHED = 2  # tiles of the weight
_LINE = 64  # elements of a cache line, two bytes each


class Launch(NamedTuple):
    """How the kernel is cut. swapped: outputs lie along the tensor core's M, of which it takes at least 64."""

    block_out: int
    block_in: int
    num_warps: int
    num_stages: int
    swapped: bool


# The best of a sweep over the projections of an 8B model on an H200 (docs/benchmarks.md).
_STREAM = Launch(64, 128, 4, 7, swapped=True)
_SHORT_STREAM = Launch(64, 128, 4, 5, swapped=True)
_ONE_WAVE = Launch(32, 256, 4, 4, swapped=False)
_MANY_OUTPUTS = Launch(128, 128, 8, 4, swapped=True)
_MANY = 8192


def is_faster(x: Tensor) -> bool:
    """Whether it is, than cuBLAS, for these rows: measured on an H200 (docs/benchmarks.md)."""
    return x.dtype.itemsize == 2 and 0 < x.shape[0] <= MAX_ROWS and capability(x.device)[0] == HOPPER[0]


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    launch: Launch | None = None,
) -> Tensor:
    """See `kernels.linear`; at most 64 rows. `launch` is for tests and measurements."""
    num_rows, in_features = x.shape
    out_features = weight.shape[0]
    if num_rows > MAX_ROWS or x.stride(1) != 1 or weight.stride(1) != 1:
        raise ValueError(f"linear takes at most {MAX_ROWS} rows and contiguous features")
    y = torch.empty((num_rows, out_features), dtype=x.dtype, device=x.device) if out is None else out
    if not num_rows:
        return y
    launch = launch or _default_launch(x.device, num_rows, out_features)
    constants: dict[str, Any] = {
        "HAS_BIAS": bias is not None,
        "EVEN": out_features % launch.block_out == 0 and in_features % launch.block_in == 0,
        "BLOCK_ROWS": max(16, triton.next_power_of_2(num_rows)),
        "BLOCK_OUT": launch.block_out,
        "BLOCK_IN": launch.block_in,
        "SWAPPED": launch.swapped,
        "PREFETCHED": _PREFETCHED,
        "LINE": _LINE,
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        **overlapping(x.device),
    }
    _linear[(triton.cdiv(out_features, launch.block_out),)](
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        weight if bias is None else bias,
        y,
        num_rows,
        out_features,
        in_features,
        **constants,
    )
    return y


def _default_launch(device: torch.device, num_rows: int, out_features: int) -> Launch:
    if out_features > _MANY:
        return _MANY_OUTPUTS
    if num_rows <= 32:
        return _STREAM
    one_wave = _ONE_WAVE.block_out * multiprocessors(device)
    return _ONE_WAVE if out_features <= one_wave else _SHORT_STREAM


@triton.jit(do_not_specialize=["num_rows"])
def _linear(
    x,
    x_stride,
    weight,
    weight_stride,
    bias,
    y,
    num_rows,
    out_features,
    in_features,
    HAS_BIAS: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUT: tl.constexpr,
    BLOCK_IN: tl.constexpr,
    SWAPPED: tl.constexpr,
    PREFETCHED: tl.constexpr,
    LINE: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    out = tl.program_id(0) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    row = tl.arange(0, BLOCK_ROWS)
    feature = tl.arange(0, BLOCK_IN)
    weight_rows = weight + out.to(tl.int64)[:, None] * weight_stride
    if OVERLAPS:
        for tile in tl.static_range(PREFETCHED):  # pyright: ignore[reportGeneralTypeIssues]
            line = tile * BLOCK_IN + tl.arange(0, BLOCK_IN // LINE)[None, :] * LINE
            prefetch_to_l2(weight_rows + line, (out < out_features)[:, None] & (line < in_features))
    wait_for_earlier(OVERLAPS)
    let_next_start(OVERLAPS)  # a shrink of the same x may run beside this

    known_row, known_out = row < num_rows, out < out_features
    x_rows = x + row[:, None] * x_stride
    acc = tl.zeros((BLOCK_OUT, BLOCK_ROWS) if SWAPPED else (BLOCK_ROWS, BLOCK_OUT), tl.float32)
    for start in range(0, in_features, BLOCK_IN):
        at = start + feature[None, :]
        if EVEN:
            tile_x = tl.load(x_rows + at, mask=known_row[:, None], other=0.0)
            tile_w = tl.load(weight_rows + at)
        else:
            inside = at < in_features
            tile_x = tl.load(x_rows + at, mask=known_row[:, None] & inside, other=0.0)
            tile_w = tl.load(weight_rows + at, mask=known_out[:, None] & inside, other=0.0)
        acc = tl.dot(tile_w, tl.trans(tile_x), acc) if SWAPPED else tl.dot(tile_x, tl.trans(tile_w), acc)
    if SWAPPED:
        acc = tl.trans(acc)
    if HAS_BIAS:
        acc += tl.load(bias + out, mask=known_out, other=0.0).to(tl.float32)[None, :]
    at = row.to(tl.int64)[:, None] * out_features + out[None, :]
    tl.store(y + at, acc.to(y.dtype.element_ty), mask=known_row[:, None] & known_out[None, :])
