"""The LoRA side of one step: which runs of tokens use which slices of which adapters."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from manylora.kernels.lora_work import LoRAWork
from manylora.lora.page_layout import SITES, SLICE_ROWS, PoolGeometry


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
    """Views of the plan's sections: on the host for the reference ops, on the device with `work` for the kernels.

    segments: (num_segments, 4) of integers: first token, end token, first entry in `slices`, number of slices. Tokens
        outside every segment have no adapter and cost nothing.
    slices: (num_slice_refs,) of integers: rows of the slice table, in the order of the adapter's slices.
    max_slices: the most slices any segment has (≥ 1); a host integer.
    work: what the kernels go through instead; None where the reference ops run.
    captured: for a graph, where a second stream costs nothing; launched one by one, its events take longer than they gain.
    """

    segments: torch.Tensor
    slices: torch.Tensor
    max_slices: int
    work: LoRAWork | None = None
    captured: bool = False

    @classmethod
    def on_device(
        cls,
        segments: torch.Tensor,
        slices: torch.Tensor,
        max_slices: int,
        num_tokens: int,
        geometry: PoolGeometry,
        lender: LoRABatch | None = None,
        *,
        captured: bool = False,
    ) -> LoRABatch:
        """A step of `num_tokens` tokens for the kernels. Call `prepare` before its first site.

        For a captured graph the tensors are its static inputs, with room for any step it serves: segments that are all
        zero are padding, and `max_slices` is a bound. `lender`: another, never in use at the same time, to share memory with.
        """
        columns = max(map(len, SITES)) * geometry.slice_width(SLICE_ROWS)
        lent = lender.work if lender is not None else None
        work = LoRAWork(segments, slices, max_slices, num_tokens, columns, lent)
        return cls(segments, slices, max_slices, work, captured)

    def of_rows(self, offsets: torch.Tensor) -> LoRABatch:
        """The same step with one token left of each row, prepared. offsets (R,) int64: the rows' first tokens, rising."""
        ends = torch.searchsorted(offsets.contiguous(), self.segments[:, :2].contiguous())
        segments = torch.cat((ends.to(self.segments.dtype), self.segments[:, 2:]), 1)
        work = None if self.work is None else self.work.resized(segments, len(offsets))
        batch = replace(self, segments=segments, work=work)
        batch.prepare()
        return batch

    def prepare(self) -> None:
        """Make the kernels' work list of what the tensors hold now: once a step, inside the graph if there is one."""
        if self.work is not None:
            from manylora.kernels import lora_work_triton

            lora_work_triton.list_work(self.work)
