"""The Triton version of `rope_and_store`: two programs a token, one for its queries and one for its keys and values."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from manylora.kernels.addend import Addend
from manylora.kernels.addend_triton import addend_arguments, load_more
from manylora.kernels.dependent_launch import let_next_start, overlapping, wait_for_earlier


def rope_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos_sin: Tensor,
    positions: Tensor,
    kv_cache: Tensor,
    kv_slots: Tensor,
    addend: Addend | None = None,
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
        "ADDS": addend is not None,
        **overlapping(q.device),
    }
    if num_tokens:
        arguments: list[Any] = [q, *q.stride()[:2], k, *k.stride()[:2], v, *v.stride()[:2]]
        arguments += addend_arguments(addend, q)
        arguments += [cos_sin, cos_sin.stride(0), positions, kv_cache, *kv_cache.stride()[:4], kv_slots]
        _rope_and_store[(num_tokens, 2)](*arguments, **constants)


@triton.jit
def _rotate(source, more, target, cos, sin, lanes, valid, more_valid, HALF: tl.constexpr, ADDS: tl.constexpr):
    """Write rotated heads. source, more, target: (heads, 1) pointers, source and target perhaps the same; valid and
    more_valid (heads, lanes)."""
    a = tl.load(source + lanes[None, :], mask=valid, other=0.0).to(tl.float32)
    b = tl.load(source + HALF + lanes[None, :], mask=valid, other=0.0).to(tl.float32)
    if ADDS:
        a += load_more(more + lanes[None, :], more_valid)
        b += load_more(more + HALF + lanes[None, :], more_valid)
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
    more,
    more_stride,
    has_more,
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
    ADDS: tl.constexpr,
    OVERLAPS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_HALF)
    angle = cos_sin + tl.load(positions + token) * cos_sin_stride + lanes
    cos = tl.load(angle, mask=lanes < HALF, other=0.0)
    sin = tl.load(angle + HALF, mask=lanes < HALF, other=0.0)
    half = (lanes < HALF)[None, :]
    slot = tl.load(kv_slots + token)
    more_row = more + token * more_stride
    more_count = 1
    if ADDS:
        more_count = tl.load(has_more + token)
    wait_for_earlier(OVERLAPS)
    let_next_start(OVERLAPS)
    if tl.program_id(1) == 0:
        head = tl.arange(0, BLOCK_HEADS)[:, None]
        source = q + token * q_token_stride + head * q_head_stride
        more_q = more_row + head * (2 * HALF)
        more_heads = (head < HEADS * more_count) & half
        _rotate(source, more_q, source, cos, sin, lanes, (head < HEADS) & half, more_heads, HALF, ADDS)
    else:
        kv_head = tl.arange(0, BLOCK_KV_HEADS)[:, None]
        target = kv_cache + slot // PAGE_SIZE * page_stride + slot % PAGE_SIZE * slot_stride
        target += kv_head * head_stride
        key = k + token * k_token_stride + kv_head * k_head_stride
        more_k = more_row + (HEADS + kv_head) * (2 * HALF)
        more_keys = (kv_head < KV_HEADS * more_count) & half
        _rotate(key, more_k, target, cos, sin, lanes, (kv_head < KV_HEADS) & half, more_keys, HALF, ADDS)
        dims = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        valid = (kv_head < KV_HEADS) & (dims < 2 * HALF)
        value = tl.load(v + token * v_token_stride + kv_head * v_head_stride + dims, mask=valid, other=0.0)
        if ADDS:
            more_v = more_row + (HEADS + KV_HEADS + kv_head) * (2 * HALF)
            more_dims = (kv_head < KV_HEADS * more_count) & (dims < 2 * HALF)
            value = value.to(tl.float32) + load_more(more_v + dims, more_dims)
        tl.store(target + v_offset + dims, value.to(kv_cache.dtype.element_ty), mask=valid)
