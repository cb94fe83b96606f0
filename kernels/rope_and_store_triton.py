"""The Triton version of `rope_and_store`: two programs a token, one for its queries and one for its keys and values."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.dependent_launch import let_next_start, overlapping, wait_for_earlier


def rope_and_store(
    q: Tensor, k: Tensor, v: Tensor, cos_sin: Tensor, positions: Tensor, kv_cache: Tensor, kv_slots: Tensor
) -> None:
    """See `kernels.rope_and_store`; k is left as it was. positions and kv_slots are contiguous."""
    num_tokens, heads, head_dim = q.shape
    kv_heads = k.shape[1]
    # A dimension of one element may have any stride.
    if any(x.stride(-1) != 1 < x.shape[-1] for x in (q, k, v, cos_sin, positions, kv_cache, kv_slots)):
        raise ValueError("rope_and_store takes tensors whose last dimension is contiguous")
    constants: dict[str, Any] = {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "HALF": head_dim // 2,
        "PAGE_SIZE": kv_cache.shape[3],
        "BLOCK_HEADS": triton.next_power_of_2(heads),
        "BLOCK_KV_HEADS": triton.next_power_of_2(kv_heads),
        "BLOCK_HALF": triton.next_power_of_2(head_dim // 2),
        **overlapping(q.device),
    }
    if num_tokens:
        arguments: list[Any] = [q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2]]
        arguments += [cos_sin, cos_sin.stride(0), positions, kv_cache, *kv_cache.stride()[:4], kv_slots]
        _rope_and_store[(num_tokens, 2)](*arguments, **constants)


@triton.jit
def _rotate(source, target, cos, sin, lanes, valid, HALF: tl.constexpr):
    """Write rotated heads. source, target: (heads, 1) pointers, which may be the same; valid (heads, lanes)."""
    a = tl.load(source + lanes[None, :], mask=valid, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + lanes[None, :], mask=valid, other=0.0).to(tl.float32)
    rotated_a = a * cos[None, :] - b * sin[None, :]
    rotated_b = b * cos[None, :] + a * sin[None, :]
    tl.store(target + lanes[None, :], rotated_a.to(target.dtype.element_ty), mask=valid)
    tl.store(target + HALF + lanes[None, :], rotated_b.to(target.dtype.element_ty), mask=valid)


@triton.jit
def _rope_and_store(
    q,
    q_token_stride,
    q_head_stride,
    k,
    k_token_stride,
    k_head_stride,
    v,
    v_token_stride,
    v_head_stride,
    cos_sin,
    cos_sin_stride,
    positions,
    kv_cache,
    page_stride,
    v_offset,
    head_stride,
    slot_stride,
    kv_slots,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_KV_HEADS: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_HALF)
    angle = cos_sin + tl.load(positions + token) * cos_sin_stride + lanes
    cos = tl.load(angle, mask=lanes < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=lanes < HALF, other=0.0)
    half = (lanes < HALF)[None, :]
    slot = tl.load(kv_slots + token)
    wait_for_earlier(OVERLAPS)
    let_next_start(OVERLAPS)
    if tl.program_id(1) == 0:
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        source = q + token * q_token_stride + head * q_head_stride
        _rotate(source, source, cos, sin, lanes, (head < HEADS) & half, HALF)
    else:
        kv_head = tl.arange(0, BLOCK_KV_HEADS)[:, None]
        target = kv_cache + slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride
        target += kv_head * head_stride
        key = k + token * k_token_stride + kv_head * k_head_stride
        _rotate(key, target, cos, sin, lanes, (kv_head < KV_HEADS) & half, HALF)
        dims = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        valid = (kv_head < KV_HEADS) & (dims < 2 * HALF)
        value = tl.load(v + token * v_token_stride + kv_head * v_head_stride + dims, mask=valid, other=0.0)
        tl.store(target + v_offset + dims, value, mask=valid)
