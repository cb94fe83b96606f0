"""A rank's part of one checkpoint tensor, and where it goes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Source(Protocol):
    """A whole tensor, or a file's promise of one (`safetensors` slices): cut before it is read."""

    def __getitem__(self, index: tuple[slice, ...], /) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Shard:
    """`target` (a view of a weight) is the checkpoint's tensor of `full_shape`, from `start` on along `dim`."""

    target: Tensor
    full_shape: tuple[int, ...]
    dim: int = 0
    start: int = 0

    def load(self, full: Source) -> None:
        """Copy this rank's part of `full`, which has `full_shape`, in the target's dtype."""
        size = self.target.shape[self.dim]
        if size:
            part = slice(self.start, self.start + size)
            self.target.copy_(full[(slice(None),) * self.dim + (part,)])


Shards = Iterator[tuple[str, Shard]]  # (name in the checkpoint, shard)
