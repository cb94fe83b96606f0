"""The LoRA side of one step: which runs of tokens use which slices of which adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch


class Collectives(Protocol):
    """What a delta needs of the tensor-parallel group (`tp_worker.distributed.TPGroup` is one)."""

    rank: int
    size: int

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, in place; every rank ends with the same bits. Returns x."""
        ...

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(…) -> (size, …): every rank's x, in rank order."""
        ...


@dataclass(slots=True)
class LoRABatch:
    """Views of the plan's sections. The reference ops take them on the host, Triton kernels on the device.

    segments: (num_segments, 4) int32: first token, end token, first entry in `slices`, number of slices. Tokens outside
        every segment have no adapter and cost nothing.
    slices: (num_slice_refs,) int32: rows of the slice table, in the order of the adapter's slices.
    max_slices: the most slices any segment has (≥ 1); a host integer.
    """

    segments: torch.Tensor
    slices: torch.Tensor
    max_slices: int
