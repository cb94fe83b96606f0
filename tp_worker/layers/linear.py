"""Matrix products split over the ranks, each with the LoRA delta of its site.

Layers are plain callables without autograd: weights are made empty, filled through `shards`, and never change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from manylora.kernels.addend import Addend
from manylora.kernels.linear import linear
from manylora.lora.lora_batch import LoRABatch
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.shard import Shard, Shards


class Delta(Protocol):
    """What adapters add to a layer (`lora/delta.py` has the one we use)."""

    def begin(self, x: Tensor, batch: LoRABatch) -> Tensor | None:
        """Start on x (T, in_local) what needs no base product, perhaps beside it. Returns what `finish` takes."""
        ...

    def finish(self, x: Tensor, begun: Tensor | None, y: Tensor, batch: LoRABatch) -> Addend | None:
        """y += the delta of x, in place, or what is still to be added; the latter only to a layer that `defers`.

        y (T, out_local): the base product of this rank, just launched.
        """
        ...


Product = tuple[Tensor, Addend | None]  # (T, out), and what its reader has to add


def linear_with_delta(
    x: Tensor, weight: Tensor, bias: Tensor | None, delta: Delta | None, batch: LoRABatch | None
) -> Product:
    """x·weightᵀ + bias, plus the delta if the layer has one and the step any adapters."""
    if delta is None or batch is None:
        return linear(x, weight, bias), None
    begun = delta.begin(x, batch)
    y = linear(x, weight, bias)
    return y, delta.finish(x, begun, y, batch)


@dataclass(frozen=True, slots=True)
class Part:
    """One of the matrices fused in a column-parallel layer: this rank has `size` of its `full` rows, from `start`."""

    name: str
    full: int
    start: int
    size: int


def even_part(name: str, full: int, group: TPGroup) -> Part:
    """The part of a matrix whose rows are dealt out evenly."""
    size = full // group.size
    return Part(name, full, group.rank * size, size)


class ColumnParallelLinear:
    """Each rank has some output rows of every fused matrix; the input is whole, the output is this rank's.

    weight (sum of part sizes, in_features), parts one after another. defers: whether what reads the output can add to it.
    """

    def __init__(
        self,
        in_features: int,
        parts: Sequence[Part],
        *,
        bias: bool,
        group: TPGroup,
        dtype: torch.dtype,
        defers: bool = True,
    ) -> None:
        out_local = sum(part.size for part in parts)
        self.parts = tuple(parts)
        self.defers = defers
        self.weight = torch.empty((out_local, in_features), dtype=dtype, device=group.device)
        self.bias = torch.empty(out_local, dtype=dtype, device=group.device) if bias else None
        self.lora: Delta | None = None

    def __call__(self, x: Tensor, batch: LoRABatch | None) -> Product:
        """(T, in_features) -> (T, out_local)."""
        return linear_with_delta(x, self.weight, self.bias, self.lora, batch)

    def shards(self, prefix: str) -> Shards:
        sizes = [part.size for part in self.parts]
        weights = self.weight.split(sizes)
        in_features = self.weight.shape[1]
        for part, weight in zip(self.parts, weights, strict=True):
            yield f"{prefix}{part.name}.weight", Shard(weight, (part.full, in_features), 0, part.start)
        if self.bias is not None:
            for part, bias in zip(self.parts, self.bias.split(sizes), strict=True):
                yield f"{prefix}{part.name}.bias", Shard(bias, (part.full,), 0, part.start)


class RowParallelLinear:
    """Each rank has some input columns; the partial products are summed over the ranks. weight (out, in_local).

    The delta of several ranks goes into the partial product, so the layer's own reduction completes it; the bias is added
    after.
    """

    def __init__(
        self,
        name: str,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        group: TPGroup,
        dtype: torch.dtype,
    ) -> None:
        self.name = name
        self.group = group
        self.defers = group.size == 1
        self.weight = torch.empty((out_features, in_features // group.size), dtype=dtype, device=group.device)
        self.bias = torch.empty(out_features, dtype=dtype, device=group.device) if bias else None
        self.lora: Delta | None = None

    def __call__(self, x: Tensor, batch: LoRABatch | None) -> Product:
        """(T, in_local) -> (T, out_features), the same on every rank."""
        y, addend = linear_with_delta(x, self.weight, None, self.lora, batch)
        self.group.all_reduce(y)
        if self.bias is not None:
            y += self.bias
        return y, addend

    def shards(self, prefix: str) -> Shards:
        out_features, in_local = self.weight.shape
        full_shape = (out_features, in_local * self.group.size)
        yield (
            f"{prefix}{self.name}.weight",
            Shard(self.weight, full_shape, 1, self.group.rank * in_local),
        )
        if self.bias is not None:
            yield f"{prefix}{self.name}.bias", Shard(self.bias, (out_features,))
