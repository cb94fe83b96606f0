"""CUDA graphs on the CPU: a replay runs the captured step once more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from manylora.kernels.decode_inputs import Bounds
from manylora.lora.lora_batch import LoRABatch
from manylora.tp_worker.decode_graph import DecodeGraph, DecodeResult
from manylora.tp_worker.piecewise_graph import PiecewiseGraph
from manylora.tp_worker.step_inputs import StepInputs


@dataclass
class Replays:
    """What decode graphs have left, and the tokens that a bucket of pieces was given at each replay."""

    results: list[DecodeResult] = field(default_factory=list)
    pieces: list[list[int]] = field(default_factory=list)


def run_again_instead(monkeypatch: pytest.MonkeyPatch) -> Replays:
    """Until the test ends."""
    replays = Replays()

    def capture(self: Any, forward: Any, logits: Any, memory: object, stream: object) -> None:
        self._step_again = lambda: self._step(forward, logits)
        self._result = self._step_again()

    def replay(self: Any, payload: torch.Tensor, bounds: Bounds) -> DecodeResult:
        self._fill(payload, bounds)
        replays.results.append(self._step_again())
        return replays.results[-1]

    def capture_pieces(self: Any, forward: Any, memory: object, stream: object) -> None:
        self._again = forward
        self.rehearse(forward)

    def replay_pieces(self: Any, inputs: StepInputs) -> None:
        def cut(queries: torch.Tensor, kv_cache: torch.Tensor, scale: float) -> torch.Tensor:
            attended = self._buffers.take(queries)
            self._buffers.attend(inputs, kv_cache, scale)
            return attended

        replays.pieces.append(self._given[0].tolist())
        self._forward(self._again, cut)

    def on_host(
        segments: torch.Tensor, slices: torch.Tensor, max_slices: int, *_: Any, **__: Any
    ) -> LoRABatch:
        # The graph's static inputs, which no kernel but the reference ops read.
        return LoRABatch(segments, slices, max_slices)

    monkeypatch.setattr(LoRABatch, "on_device", on_host)
    monkeypatch.setattr(DecodeGraph, "capture", capture)
    monkeypatch.setattr(DecodeGraph, "replay", replay)
    monkeypatch.setattr(PiecewiseGraph, "capture", capture_pieces)
    monkeypatch.setattr(PiecewiseGraph, "_replay", replay_pieces)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return replays
