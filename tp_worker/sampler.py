"""From a step's logits to its tokens: which of the sampling ops this plan needs, with each row's own parameters."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from manylora.kernels.sampling import (
    add_biases,
    apply_penalties,
    forbid_tokens,
    keep_allowed,
    rows_finite,
    sample,
    sample_greedy,
    uniform,
)
from manylora.runtime.plan import ForwardBatch
from manylora.tp_worker.slot_state import SamplingColumns, SlotState


@dataclass(slots=True)
class Masks:
    """What some rows may draw. rows: (k,) int64, places among the samples; words: (k, ⌈vocab / 32⌉) int32."""

    rows: torch.Tensor
    words: torch.Tensor


def draw_tokens(
    plan: ForwardBatch,
    logits: torch.Tensor,
    state: SlotState,
    slots: torch.Tensor,
    positions: torch.Tensor,
    masks: Masks | None = None,
) -> torch.Tensor:
    """Draw the plan's samples and record them in their slots.

    logits: (n, vocab) of the model's dtype, overwritten. slots, positions: (n,) int64; a position is that of the token
    drawn. Returns (n,) int32: the tokens, -1 where the logits allow no honest draw; their slots hold some valid id then.
    """
    if only_greedy(plan):
        return state.draw_greedy(slots, logits)
    finite = rows_finite(logits)
    logits = logits.float()
    columns = state.sampling(slots)
    if plan.biases:
        add_biases(logits, state.bias_ids[slots], state.biases[slots], columns.num_biases)
    if plan.penalties:
        apply_penalties(
            logits,
            state.counts[slots],
            state.in_prompt[slots].bool(),
            columns.frequency,
            columns.presence,
            columns.repetition,
        )
    if plan.min_new:
        forbid_tokens(logits, state.stop_ids[slots], positions - columns.prompt_len < columns.min_new)
    if masks is not None:
        keep_allowed(logits, masks.rows, masks.words)
    tokens = sample_greedy(logits) if plan.greedy else _sample(logits, columns, positions)
    state.record(slots, tokens, count=plan.penalties)
    return torch.where(finite, tokens, -1).int()


def only_greedy(plan: ForwardBatch) -> bool:
    """Whether every token is the best of the model's own logits."""
    changed = plan.penalties or plan.min_new or plan.biases or plan.count("masked") > 0
    return plan.greedy and not changed


def _sample(logits: torch.Tensor, columns: SamplingColumns, positions: torch.Tensor) -> torch.Tensor:
    uniforms = uniform(columns.seed_low, columns.seed_high, columns.sample_index, positions)
    return sample(logits, columns.temperature, columns.top_k, columns.top_p, columns.min_p, uniforms)
