"""What the kernels of `lora_expand` share: reading planes and B pieces, and writing y."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton import knobs

from manylora.kernels.gpu import HOPPER, capability


def can_prefetch(device: torch.device) -> bool:
    """Whether the GPU has the instruction of `prefetch`; kernels of no GPU are compiled for one that has, or interpreted."""
    if device.type == "cuda":
        return capability(device) >= HOPPER
    return not knobs.runtime.interpret


@triton.jit
def prefetch(at, num_bytes):
    """Start bringing memory into the L2 cache, without waiting for it. Both arguments are multiples of 16."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .u32 thread;
            .reg .pred is_first, has_some;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            setp.gt.and.s32 has_some, $2, 0, is_first;
            @has_some cp.async.bulk.prefetch.L2.global [$1], $2;
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [at.to(tl.int64), num_bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def scaled_plane(
    plane,
    part_stride,
    chunk_stride,
    token,
    in_tile,
    width,
    scaling,
    columns,
    PARTS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """scaling · x·Aᵀ of one slice for the tile's tokens, (TILE_TOKENS, BLOCK_R) float32: the sum over chunks of what
    the parts hold side by side. plane: pointer to the slice's and module's column of token 0."""
    rank = tl.arange(0, BLOCK_R)
    column = rank.to(tl.int64)
    if PARTS > 1:
        rows_each = tl.maximum(width // PARTS, 1)
        column = (rank // rows_each).to(tl.int64) * part_stride + rank % rows_each
    at = plane + token[:, None] * columns + column[None, :]
    known = in_tile[:, None] & (rank < width)[None, :]
    hidden = tl.load(at, mask=known, other=0.0)
    for chunk in tl.static_range(1, CHUNKS):  # pyright: ignore[reportGeneralTypeIssues]
        hidden += tl.load(at + chunk * tl.cast(chunk_stride, tl.int64), mask=known, other=0.0)
    return hidden * scaling


@triton.jit
def load_b(piece, width, output, size, BLOCK_R: tl.constexpr):
    """Rows `output` of the B piece (size, width) at `piece`: (BLOCK_N, BLOCK_R), zero outside of it."""
    rank = tl.arange(0, BLOCK_R)
    at = piece + output[:, None].to(tl.int64) * width + rank[None, :]
    return tl.load(at, mask=(output < size)[:, None] & (rank < width)[None, :], other=0.0)


@triton.jit
def write_to(y, y_stride, acc, token, in_tile, output, size, ADDS: tl.constexpr):
    """y += acc (TILE_TOKENS, BLOCK_N) float32, rounded once; y = acc if not ADDS."""
    at = y + token[:, None] * y_stride + output[None, :]
    known = in_tile[:, None] & (output < size)[None, :]
    if ADDS:
        acc += tl.load(at, mask=known, other=0.0).to(tl.float32)
    tl.store(at, acc.to(y.dtype.element_ty), mask=known)
