"""Adapter commands of one rank: images are read beside the worker's loop, and copied to pages in it."""

from __future__ import annotations

from manylora.lora.staging import StagingThread
from manylora.lora.weight_pool import WeightPool
from manylora.runtime.messages import (
    AdapterCopied,
    AdapterStaged,
    CopyAdapter,
    DropAdapter,
    StageAdapter,
    unpack_i32,
)

AdapterCommand = StageAdapter | CopyAdapter | DropAdapter


class Adapters:
    """Adapter commands of one rank: staged beside the loop, copied in it."""

    def __init__(self, weights: WeightPool, tp_rank: int) -> None:
        self._weights = weights
        self._tp_rank = tp_rank
        self._staging = StagingThread(weights, tp_rank)

    def fileno(self) -> int:
        """Readable when a staging has ended."""
        return self._staging.fileno()

    @property
    def copying(self) -> bool:
        return self._weights.copying

    def execute(self, command: AdapterCommand) -> None:
        if isinstance(command, CopyAdapter):
            self._weights.copy(command.version, unpack_i32(command.pages), unpack_i32(command.slices))
        else:
            self._staging.submit(command)

    def answers(self) -> list[AdapterCopied | AdapterStaged]:
        """What is complete since the last call."""
        copied = [AdapterCopied(self._tp_rank, version) for version in self._weights.done()]
        return [*copied, *self._staging.drain()]

    def close(self) -> None:
        self._staging.close()
