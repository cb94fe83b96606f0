"""The device tensors of one step, as the model sees them. Rows and tokens are ordered as in `runtime/plan.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from manylora.lora.lora_batch import LoRABatch


@dataclass(slots=True)
class StepInputs:
    """T tokens in R rows; the first `num_prefill_rows` rows hold the first `num_prefill_tokens` tokens, every later row
    exactly one token.
    """

    num_prefill_rows: int
    num_prefill_tokens: int
    max_kv_len: int
    token_ids: torch.Tensor  # (T,) int64
    positions: torch.Tensor  # (T,) int64
    kv_slots: torch.Tensor  # (T,) int64: page · page_size + offset in page, where the token's K and V go
    page_table: torch.Tensor  # (slots, pages) int64: a slot's pages in order; past its length any valid page
    rows: torch.Tensor  # (R, 4) of integers: slot, start, num_new, token_offset
    slots: torch.Tensor  # (R,) int64: the rows' slots
    kv_lens: torch.Tensor  # (R,) int64: tokens the row attends to at its end (start + num_new)
    lora: LoRABatch | None
    # (q (T, heads, head_dim), a layer's cache, scale) -> what q attends to: where a layer shall not do it by itself.
    attend: Callable[[Tensor, Tensor, float], Tensor] | None = None
