"""The Triton version of `rms_norm`: whole rows in registers, one pass over memory."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.addend import Addend
from manylora.kernels.addend_triton import addend_arguments, load_more
from manylora.kernels.dependent_launch import let_next_start, overlapping, wait_for_earlier

MAX_SIZE = 16384
_TILE = 1024  # elements a program takes at least, so that short rows (one head each) share a program


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `kernels.rms_norm`; n ≤ 16384."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    # Two leading dimensions of any strides, as a view of some heads of a fused tensor has; more are rare.
    rows = x.view(1, 1, -1) if x.dim() == 1 else x.flatten(0, -3) if x.dim() > 3 else x
    inner = rows.shape[1] if rows.dim() == 3 else 1
    inner_stride = rows.stride(1) if rows.dim() == 3 else 0
    num_rows = x.numel() // x.shape[-1]
    if num_rows:
        grid, meta = _launch(x, num_rows)
        _rms_norm[grid](
            rows, rows.stride(0), inner_stride, inner, rows.stride(-1), weight, out, num_rows, eps, **meta
        )
    return out


def fused_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, addend: Addend | None = None
) -> Tensor:
    """See `kernels.rms_norm`; x and residual contiguous, n ≤ 16384."""
    if not (x.is_contiguous() and residual.is_contiguous()):
        raise ValueError("fused_add_rms_norm takes contiguous tensors")
    out = torch.empty_like(x)
    num_rows = x.numel() // x.shape[-1]
    if num_rows:
        grid, meta = _launch(x, num_rows)
        meta["ADDS"] = addend is not None
        arguments = [x, residual, *addend_arguments(addend, x), weight, out, num_rows, eps]
        _fused_add_rms_norm[grid](*arguments, **meta)
    return out


def _launch(x: Tensor, num_rows: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, and constants of the kernel."""
    size = x.shape[-1]
    if size > MAX_SIZE:
        raise ValueError(f"rows of {size} elements, at most {MAX_SIZE} are implemented")
    block = 1 << (size - 1).bit_length()
    rows_each = max(1, _TILE // block)
    warps = min(16, max(1, rows_each * block // 512))
    meta = {"SIZE": size, "BLOCK": block, "ROWS": rows_each, "num_warps": warps, **overlapping(x.device)}
    return (-(-num_rows // rows_each),), meta


@triton.jit
def _normed(x, weight, eps, SIZE: tl.constexpr, DTYPE: tl.constexpr):
    """x (ROWS, BLOCK) float32, zero past SIZE; weight (BLOCK,). Rounded to DTYPE before the weight, as the reference."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / SIZE + eps)
    normed = (x * scale[:, None]).to(DTYPE).to(tl.float32)
    return normed * weight.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    x,
    outer_stride,
    inner_stride,
    inner,
    column_stride,
    weight,
    out,
    num_rows,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    valid = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    starts = (rows // inner).to(tl.int64) * outer_stride + rows % inner * inner_stride
    row_weight = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    wait_for_earlier(OVERLAPS)
    wide = tl.load(x + starts[:, None] + columns[None, :] * column_stride, mask=valid, other=0.0)
    let_next_start(OVERLAPS)
    normed = _normed(wide.to(tl.float32), row_weight, eps, SIZE, x.dtype.element_ty)
    at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["num_rows"])
def _fused_add_rms_norm(
    x,
    residual,
    more,
    more_stride,
    has_more,
    weight,
    out,
    num_rows,
    eps,
    ADDS: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    valid = (rows < num_rows)[:, None] & (columns < SIZE)[None, :]
    at = rows.to(tl.int64)[:, None] * SIZE + columns[None, :]
    row_weight = tl.load(weight + columns, mask=columns < SIZE, other=0.0)
    more_valid = valid
    if ADDS:
        more_valid = valid & (tl.load(has_more + rows, mask=rows < num_rows, other=0) != 0)[:, None]
    wait_for_earlier(OVERLAPS)
    added = tl.load(x + at, mask=valid, other=0.0).to(tl.float32)
    if ADDS:
        added += load_more(more + rows.to(tl.int64)[:, None] * more_stride + columns[None, :], more_valid)
    total = tl.load(residual + at, mask=valid, other=0.0).to(tl.float32) + added
    let_next_start(OVERLAPS)
    total = total.to(residual.dtype.element_ty)
    tl.store(residual + at, total, mask=valid)
    normed = _normed(total.to(tl.float32), row_weight, eps, SIZE, x.dtype.element_ty)
    tl.store(out + at, normed.to(out.dtype.element_ty), mask=valid)
