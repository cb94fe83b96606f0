"""What a captured decode step reads: tensors that stay where they are while their contents change from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Bounds = Mapping[str, tuple[int, int, int]]  # section -> (first int32, count, width) of the payload


@dataclass(slots=True)
class DecodeInputs:
    """One token in each of `bucket` rows; int64. Rows past those of the step are padding, in the dummy slot.

    rows: (bucket, 4): slot, start, num_new, token_offset; padding has no new token. token_ids, positions, kv_slots,
    kv_lens: (bucket,), as in `StepInputs`. segments: (bucket, 4), zero past those of the step, and slices:
    (bucket · max_slices,), leftovers past those of the step; both empty without LoRA.
    """

    rows: Tensor
    token_ids: Tensor
    positions: Tensor
    kv_slots: Tensor
    kv_lens: Tensor
    segments: Tensor
    slices: Tensor

    @classmethod
    def empty(cls, bucket: int, max_slices: int, device: torch.device) -> DecodeInputs:
        """To be filled before its first use. Zeros until then: valid as indices for a step that is only compiled."""

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int64, device=device)

        num_segments = bucket if max_slices else 0
        return cls(
            rows=zeros(bucket, 4),
            token_ids=zeros(bucket),
            positions=zeros(bucket),
            kv_slots=zeros(bucket),
            kv_lens=zeros(bucket),
            segments=zeros(num_segments, 4),
            slices=zeros(bucket * max_slices),
        )
