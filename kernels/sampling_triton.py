"""The Triton version of `sample`: the kept tokens are found by searching for the lowest logit among them, not by sorting.

One program per row reads the row a dozen times or so, out of the L2 cache after the first.
"""
# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false, reportAttributeAccessIssue=false
# Triton's stubs know neither that tl.range is iterable nor what constants and several results of a kernel may do.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from manylora.kernels.fixed_point import MASS_BITS, UNIFORM_BITS

_BLOCK = 4096


def uniform(
    seed_low: torch.Tensor, seed_high: torch.Tensor, sample_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """See `kernels.sampling`; one-dimensional views of any strides."""
    num_rows = len(position)
    out = torch.empty(num_rows, dtype=torch.float32, device=position.device)
    columns = (seed_low, seed_high, sample_index, position)
    strides: list[Any] = [column.stride(0) for column in columns]
    meta: dict[str, Any] = {"BITS": UNIFORM_BITS, "BLOCK": 128}
    if num_rows:
        _uniform[(triton.cdiv(num_rows, 128),)](out, num_rows, *columns, *strides, **meta)
    return out


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.sampling`; rows of contiguous logits, parameters of any strides."""
    num_rows, vocab = logits.shape
    out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    columns = (temperature, top_k, top_p, min_p, uniforms)
    strides: list[Any] = [column.stride(0) for column in columns]
    block = min(_BLOCK, triton.next_power_of_2(vocab))
    meta: dict[str, Any] = {
        "MASS_BITS": MASS_BITS,
        "UNIFORM_BITS": UNIFORM_BITS,
        "BLOCK": block,
        "num_warps": max(1, block // 128),
    }
    if num_rows:
        _sample[(num_rows,)](logits, logits.stride(0), vocab, out, *columns, *strides, **meta)
    return out


@triton.jit(  # positions lie wherever a plan has room for them
    do_not_specialize=["num_rows"],
    do_not_specialize_on_alignment=["seed_low", "seed_high", "sample_index", "position"],
)
def _uniform(
    out,
    num_rows,
    seed_low,
    seed_high,
    sample_index,
    position,
    low_stride,
    high_stride,
    index_stride,
    position_stride,
    BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    known = row < num_rows
    low = tl.load(seed_low + row * low_stride, mask=known, other=0) & 0xFFFFFFFF
    high = tl.load(seed_high + row * high_stride, mask=known, other=0)
    first = tl.load(position + row * position_stride, mask=known, other=0).to(tl.uint32)
    second = tl.load(sample_index + row * index_stride, mask=known, other=0).to(tl.uint32)
    zero = tl.zeros((BLOCK,), tl.uint32)
    word, _, _, _ = tl.philox((high << 32) | low, first, second, zero, zero)
    drawn = (word.to(tl.uint32, bitcast=True) >> (32 - BITS)).to(tl.float32) / (1 << BITS)
    tl.store(out + row, drawn, mask=known)


@triton.jit
def _load(logits, first, vocab, BLOCK: tl.constexpr):
    token = first + tl.arange(0, BLOCK)
    return tl.load(logits + token, mask=token < vocab, other=float("-inf"))


@triton.jit
def _share(values, best, inverse):
    """exp((values - best) / temperature), and 0 for what is no number."""
    share = tl.exp((values - best) * inverse)
    return tl.where(share >= 0, share, 0.0)


@triton.jit
def _mass(share, MASS_BITS: tl.constexpr):
    return (share * (1 << MASS_BITS)).to(tl.int64)


@triton.jit
def _best(logits, vocab, BLOCK: tl.constexpr):
    """The largest logit of a row, and the lowest id that has it (0 if none has)."""
    best = tl.full((BLOCK,), float("-inf"), tl.float32)
    token = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, vocab, BLOCK, num_stages=3):
        values = _load(logits, first, vocab, BLOCK)
        token = tl.where(values > best, first + tl.arange(0, BLOCK), token)
        best = tl.maximum(best, values)
    highest = tl.max(best, 0)
    return highest, tl.min(tl.where(best == highest, token, vocab - 1), 0)


@triton.jit
def _all_mass(logits, vocab, best, inverse, MASS_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The sum of all masses, and the lowest logit whose mass is not zero."""
    total = tl.zeros((BLOCK,), tl.int64)
    lowest = tl.full((BLOCK,), float("inf"), tl.float32)
    for first in tl.range(0, vocab, BLOCK, num_stages=3):
        values = _load(logits, first, vocab, BLOCK)
        mass = _mass(_share(values, best, inverse), MASS_BITS)
        total += mass
        lowest = tl.minimum(lowest, tl.where(mass > 0, values, float("inf")))
    return tl.sum(total, 0), tl.min(lowest, 0)


@triton.jit
def _halves(logits, vocab, best, inverse, low, middle, high, MASS_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of the logits in (middle, high]: their number, their mass and the lowest; of [low, middle]: the highest."""
    count = tl.zeros((BLOCK,), tl.int32)
    mass = tl.zeros((BLOCK,), tl.int64)
    above = tl.full((BLOCK,), float("inf"), tl.float32)
    below = tl.full((BLOCK,), float("-inf"), tl.float32)
    for first in tl.range(0, vocab, BLOCK, num_stages=3):
        values = _load(logits, first, vocab, BLOCK)
        is_above = (values > middle) & (values <= high)
        count += is_above.to(tl.int32)
        mass += tl.where(is_above, _mass(_share(values, best, inverse), MASS_BITS), 0)
        above = tl.minimum(above, tl.where(is_above, values, float("inf")))
        below = tl.maximum(below, tl.where((values >= low) & (values <= middle), values, float("-inf")))
    return tl.sum(count, 0), tl.sum(mass, 0), tl.min(above, 0), tl.max(below, 0)


@triton.jit
def _cut(logits, vocab, best, inverse, low, top_k, limit, MASS_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The lowest logit that is kept, and how many of those equal to it are.

    Kept, going down from the best, is what has less than `top_k` tokens and less than `limit` mass before it; `low` is
    the lowest logit that may be. Both ends of the search are logits of the row, the upper one always kept; above it
    lie `count` tokens of `mass`, all kept.
    """
    high = best
    count = tl.zeros((), tl.int32)
    mass = tl.zeros((), tl.int64)
    while low < high:
        middle = low + (high - low) * 0.5
        middle = tl.where((middle >= low) & (middle < high), middle, low)
        more, more_mass, above, below = _halves(
            logits, vocab, best, inverse, low, middle, high, MASS_BITS, BLOCK
        )
        lower = (count + more < top_k) & (mass + more_mass < limit)
        count += tl.where(lower, more, 0)
        mass += tl.where(lower, more_mass, 0)
        high = tl.where(lower, below, high)
        low = tl.where(lower, low, above)
    each = tl.maximum(_mass(_share(high, best, inverse), MASS_BITS), 1)
    return high, tl.minimum((top_k - count).to(tl.int64), (limit - mass + each - 1) // each)


@triton.jit
def _kept_mass(logits, vocab, best, inverse, cut, min_p, MASS_BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of what is kept above `cut`, and the number of tokens at it."""
    mass = tl.zeros((BLOCK,), tl.int64)
    ties = tl.zeros((BLOCK,), tl.int32)
    for first in tl.range(0, vocab, BLOCK, num_stages=3):
        values = _load(logits, first, vocab, BLOCK)
        share = _share(values, best, inverse)
        mass += tl.where((values > cut) & (share >= min_p), _mass(share, MASS_BITS), 0)
        ties += (values == cut).to(tl.int32)
    return tl.sum(mass, 0), tl.sum(ties, 0)


@triton.jit
def _pick(
    logits, vocab, best, inverse, cut, num_ties, tie_mass, min_p, target, token,
    MASS_BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first token at which the mass of what is kept, summed by ids, exceeds `target`; `token` if none does."""
    passed = tl.zeros((), tl.int64)
    passed_ties = tl.zeros((), tl.int64)
    first = tl.zeros((), tl.int32)
    while first < vocab:
        values = _load(logits, first, vocab, BLOCK)
        share = _share(values, best, inverse)
        mass = tl.where((values > cut) & (share >= min_p), _mass(share, MASS_BITS), 0)
        is_tie = (values == cut).to(tl.int64)
        tie_number = passed_ties + tl.cumsum(is_tie, 0)
        mass += tl.where((is_tie > 0) & (tie_number <= num_ties), tie_mass, 0)
        block_mass = tl.sum(mass, 0)
        if passed + block_mass > target:
            token = first + tl.sum((passed + tl.cumsum(mass, 0) <= target).to(tl.int32), 0)
            first = vocab
        passed += block_mass
        passed_ties += tl.sum(is_tie, 0)
        first += BLOCK
    return token


@triton.jit
def _sample(
    logits,
    row_stride,
    vocab,
    out,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    uniforms,
    temperature_stride,
    top_k_stride,
    top_p_stride,
    min_p_stride,
    uniform_stride,
    MASS_BITS: tl.constexpr,
    UNIFORM_BITS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * row_stride
    temperature = tl.load(temperatures + row * temperature_stride)
    best, token = _best(logits, vocab, BLOCK)
    if temperature > 0:
        top_k = tl.load(top_ks + row * top_k_stride)
        top_p = tl.load(top_ps + row * top_p_stride)
        min_p = tl.load(min_ps + row * min_p_stride)
        inverse = tl.div_rn(1.0, temperature)
        total, lowest = _all_mass(logits, vocab, best, inverse, MASS_BITS, BLOCK)
        limit = tl.ceil(top_p.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
        limit = tl.where(top_p < 1, tl.maximum(limit, 1), total)
        cut = tl.full((), float("-inf"), tl.float32)
        num_ties = tl.zeros((), tl.int64)
        if (top_k < vocab) | (limit < total):
            cut, num_ties = _cut(logits, vocab, best, inverse, lowest, top_k, limit, MASS_BITS, BLOCK)
        kept, ties = _kept_mass(logits, vocab, best, inverse, cut, min_p, MASS_BITS, BLOCK)
        tie_share = _share(cut, best, inverse)
        tie_mass = tl.where(tie_share >= min_p, _mass(tie_share, MASS_BITS), 0)
        kept += tl.minimum(num_ties, ties.to(tl.int64)) * tie_mass
        drawn = (tl.load(uniforms + row * uniform_stride) * (1 << UNIFORM_BITS)).to(tl.int64)
        low = kept & ((1 << UNIFORM_BITS) - 1)
        target = (kept >> UNIFORM_BITS) * drawn + (low * drawn >> UNIFORM_BITS)
        token = _pick(
            logits, vocab, best, inverse, cut, num_ties, tie_mass, min_p, target, token, MASS_BITS, BLOCK
        )
    tl.store(out + row, token.to(tl.int64))
