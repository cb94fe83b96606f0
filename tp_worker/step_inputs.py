"""The device tensors of one step, as the model sees them. Rows and tokens are ordered as in `runtime/plan.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

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
    narrowed: Narrowed | None = None  # where nothing is wanted of the step but what its rows end with

    def narrow(self) -> None:
        """Want nothing but what each row ends with: behind the last KV written, no other token is computed."""
        _, _, num_new, offsets = self.rows.unbind(1)
        lora = self.lora.of_rows(offsets) if self.lora is not None else None
        alone = replace(self, num_prefill_rows=0, num_prefill_tokens=0, lora=lora)
        self.narrowed = Narrowed(offsets + num_new - 1, alone)


@dataclass(slots=True)
class Narrowed:
    """Each row's last token, by its index in the step (R,) int64, and the step of these alone: decode rows, all of them.

    What the layers have no more use for, having embedded, rotated and stored all tokens, is left in `inputs` as it was.
    """

    tokens: torch.Tensor
    inputs: StepInputs
