"""Drawing tokens from logits: penalties, masks, and top-k / top-p / min-p by inverse CDF from one counter-based uniform.

Everything after the logits is decided in integers or in fixed order, so ranks that hold the same logits draw the same
token. Nothing here synchronises with the host or looks at a row from Python.
"""

from __future__ import annotations

from functools import cache

import torch

from manylora.kernels.fixed_point import MASS_BITS, UNIFORM_BITS

_WORD = 0xFFFFFFFF
_ROUNDS = 10
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


@cache
def _philox_constants(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """(2, 1) each; kept, because making one waits for the device."""
    columns = (torch.tensor(words, device=device).unsqueeze(1) for words in (_MULTIPLIERS, _KEY_STEPS))
    multipliers, key_steps = columns
    return multipliers, key_steps


def philox(counter: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Philox-4x32-10 (Salmon et al., SC 2011), one block per column.

    counter: (4, n), key: (2, n), int64 holding 32-bit words. Returns (4, n) int64 of 32-bit words.
    """
    multipliers, key_steps = _philox_constants(counter.device)
    for _ in range(_ROUNDS):
        # The product may pass 2^63 and wrap; its 64 bits are right all the same.
        product = multipliers * counter[0::2]
        high, low = product >> 32 & _WORD, product & _WORD
        mixed = high.flip(0) ^ counter[1::2] ^ key
        counter = torch.stack((mixed[0], low[1], mixed[1], low[0]))
        key = key + key_steps & _WORD
    return counter


def uniform(
    seed_low: torch.Tensor, seed_high: torch.Tensor, sample_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """One number per row that depends on nothing but the four arguments.

    All (n,) int64; the seeds' words may be given signed. Returns (n,) float32 in [0, 1), a multiple of 2^-24.
    """
    if position.is_cuda:
        from manylora.kernels import sampling_triton

        return sampling_triton.uniform(seed_low, seed_high, sample_index, position)
    return uniform_reference(seed_low, seed_high, sample_index, position)


def uniform_reference(
    seed_low: torch.Tensor, seed_high: torch.Tensor, sample_index: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    zero = torch.zeros_like(position)
    words = philox(
        torch.stack((position, sample_index, zero, zero)),
        torch.stack((seed_low & _WORD, seed_high & _WORD)),
    )
    return (words[0] >> (32 - UNIFORM_BITS)).to(torch.float32) * 2.0**-UNIFORM_BITS


def apply_penalties(
    logits: torch.Tensor,
    counts: torch.Tensor,
    in_prompt: torch.Tensor,
    frequency: torch.Tensor,
    presence: torch.Tensor,
    repetition: torch.Tensor,
) -> None:
    """Penalise, in place, tokens that were seen.

    logits: (n, vocab) float32. counts: (n, vocab), how often each token was generated. in_prompt: (n, vocab) bool.
    frequency, presence, repetition: (n,) float32. Repetition divides positive and multiplies negative logits of tokens
    of prompt and answer; then frequency · count and presence are subtracted for tokens of the answer.
    """
    generated = counts > 0
    factor = torch.where(generated | in_prompt, repetition.unsqueeze(1), 1.0)
    logits.copy_(torch.where(logits > 0, logits / factor, logits * factor))
    logits -= frequency.unsqueeze(1) * counts
    logits -= presence.unsqueeze(1) * generated


def add_biases(
    logits: torch.Tensor, token_ids: torch.Tensor, biases: torch.Tensor, counts: torch.Tensor
) -> None:
    """Add biases[i, j] to logits[i, token_ids[i, j]] for every j < counts[i], in place.

    logits: (n, vocab) float32. token_ids: (n, k) int64, valid ids everywhere, distinct below the count. biases: (n, k)
    float32. counts: (n,) int64.
    """
    given = torch.arange(token_ids.shape[1], device=counts.device) < counts.unsqueeze(1)
    # Zeros for the rest: the order of additions to one place would matter only between numbers that are not zero.
    logits.scatter_add_(1, token_ids, torch.where(given, biases, 0.0))


def keep_allowed(logits: torch.Tensor, rows: torch.Tensor, masks: torch.Tensor) -> None:
    """Set logits[rows[i], t] to -inf, in place, for every token t whose bit in masks[i] is 0.

    logits: (n, vocab) float32. rows: (k,) int64, distinct. masks: (k, ⌈vocab / 32⌉) int32, token 32 · w + b in bit b of
    word w.
    """
    places = torch.arange(8, dtype=torch.uint8, device=masks.device)
    bits = (masks.view(torch.uint8).unsqueeze(2) >> places) & 1  # bytes of a word lie lowest first
    allowed = bits.flatten(1)[:, : logits.shape[1]].bool()
    logits[rows] = torch.where(allowed, logits[rows], -torch.inf)


def forbid_tokens(logits: torch.Tensor, token_ids: torch.Tensor, active: torch.Tensor) -> None:
    """Set logits[i, token_ids[i, :]] to -inf, in place, in rows where `active`.

    logits: (n, vocab) float32. token_ids: (n, k) int64, -1 for none. active: (n,) bool.
    """
    forbidden = active.unsqueeze(1) & (token_ids >= 0)
    # amin, so that an entry that forbids nothing cannot undo one that shares its (clamped) id.
    bound = torch.where(forbidden, -torch.inf, torch.inf).to(logits.dtype)
    logits.scatter_reduce_(1, token_ids.clamp(min=0), bound, "amin")


def sample_greedy(logits: torch.Tensor) -> torch.Tensor:
    """(n, vocab) -> (n,) int64: the best token of each row, the lowest id among equals."""
    return logits.argmax(dim=-1)


def sample(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    """Draw one token per row. Returns (n,) int64.

    logits: (n, vocab) float32; temperature, top_p, min_p, uniforms: (n,) float32; top_k: (n,) int64, ≥ 1.

    A token's mass is exp((logit - best logit) / temperature), in fixed point. With the tokens in order of falling logits,
    equal ones by rising ids, a token is kept while its rank is below `top_k`, the mass before it is below `top_p` times
    all mass and its own is at least `min_p`; all three are taken of the whole distribution. The uniform number then
    picks by mass from what is kept, in order of ids. Temperature 0 means greedy.
    """
    if logits.is_cuda:
        from manylora.kernels import sampling_triton

        return sampling_triton.sample(logits, temperature, top_k, top_p, min_p, uniforms)
    return sample_reference(logits, temperature, top_k, top_p, min_p, uniforms)


def sample_reference(
    logits: torch.Tensor,
    temperature: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
    min_p: torch.Tensor,
    uniforms: torch.Tensor,
) -> torch.Tensor:
    greedy = temperature == 0
    inverse = (1.0 / torch.where(greedy, 1.0, temperature)).unsqueeze(1)
    ordered, ids = logits.sort(dim=-1, descending=True, stable=True)
    share = torch.exp((ordered - ordered[:, :1]) * inverse).nan_to_num(0.0)
    # Fixed point, because a floating-point sum may add in another order on another GPU or at another batch size.
    mass = (share * 2.0**MASS_BITS).to(torch.int64)
    cumulative = mass.cumsum(dim=-1)
    total = cumulative[:, -1:]
    below_p = (top_p.double().unsqueeze(1) * total).ceil().to(torch.int64).clamp(min=1)
    kept = torch.arange(logits.shape[1], device=logits.device) < top_k.unsqueeze(1)
    kept &= cumulative - mass < torch.where(top_p.unsqueeze(1) < 1, below_p, total)
    kept &= share >= min_p.unsqueeze(1)
    cumulative = torch.zeros_like(mass).scatter_(1, ids, mass * kept).cumsum(dim=-1)
    target = _part_of(cumulative[:, -1:], uniforms.unsqueeze(1))
    choice = torch.searchsorted(cumulative, target, right=True).clamp(max=logits.shape[1] - 1)
    return torch.where(greedy, sample_greedy(logits), choice.squeeze(1))


def _part_of(total: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """floor(uniforms · total), exactly; in two halves, because the product takes more than 64 bits."""
    drawn = (uniforms * 2.0**UNIFORM_BITS).to(torch.int64)
    low = total & (1 << UNIFORM_BITS) - 1
    return (total >> UNIFORM_BITS) * drawn + (low * drawn >> UNIFORM_BITS)


def rows_finite(logits: torch.Tensor) -> torch.Tensor:
    """(n, vocab) -> (n,) bool: no NaN and no infinity in the row."""
    return logits.isfinite().all(dim=-1)
