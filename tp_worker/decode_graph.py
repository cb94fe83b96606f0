"""Decode steps as CUDA graphs: one per batch bucket, with LoRA and without.

A LoRA graph serves any mix of adapters, ranks and rows without an adapter, since its kernels read their work from memory.
A step is padded to its bucket with rows of no length in the dummy slot. Greedy tokens are drawn inside the graph; other
ways of drawing go on from its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from manylora.kernels.sampling import rows_finite, sample_greedy
from manylora.lora.lora_batch import LoRABatch
from manylora.lora.page_layout import PoolGeometry
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.step_inputs import StepInputs

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Planes, and what ranks exchange of them, are as many as the slices a graph has room for. One rank exchanges nothing, so
# one generous bound does; several have graphs for each.
_BOUNDS_ALONE, _BOUNDS_SHARED = (16,), (1, 4, 16)
_WARM_UPS = 2

Forward = Callable[[StepInputs], torch.Tensor]
Logits = Callable[[torch.Tensor], torch.Tensor]


@dataclass(slots=True)
class DecodeResult:
    """What one replay left, valid until the next: the first rows are the step's."""

    logits: torch.Tensor  # (bucket, vocab) float32
    tokens: (
        torch.Tensor
    )  # (bucket,) int32: the greedy draw, in the slots already; -1 where the logits were not finite


class _Graph:
    """One captured step of `bucket` rows with room for `max_slices` slices an adapter (0: no LoRA).

    `lender`: the LoRA batch of another graph, to share memory with.
    """

    def __init__(
        self,
        bucket: int,
        max_slices: int,
        geometry: PoolGeometry,
        state: SlotState,
        lender: LoRABatch | None,
    ) -> None:
        device = state.page_table.device
        self._state = state
        self._page_size = geometry.page_size
        self._padding = torch.tensor([state.dummy_slot, 0, 0, 0], device=device)
        self._rows = self._padding.repeat(bucket, 1)
        self.lora: LoRABatch | None = None
        if max_slices:
            self._segments = torch.zeros((bucket, 4), dtype=torch.int64, device=device)
            self._slices = torch.zeros(bucket * max_slices, dtype=torch.int64, device=device)
            self.lora = LoRABatch.on_device(
                self._segments, self._slices, max_slices, bucket, geometry, lender
            )
        self._graph = torch.cuda.CUDAGraph()
        self.result: DecodeResult | None = None

    def capture(self, forward: Forward, logits: Logits, memory: Any, stream: torch.cuda.Stream) -> None:
        """Run the empty step a few times, so that nothing is compiled or allocated late, then capture it."""
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step(forward, logits)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            self.result = self._step(forward, logits)

    def replay(self, sections: dict[str, torch.Tensor]) -> DecodeResult:
        """Take in the plan's sections and launch."""
        assert self.result is not None
        rows = sections["rows"]
        self._rows[: len(rows)] = rows
        self._rows[len(rows) :] = self._padding
        if self.lora is not None:
            segments, slices = sections["segments"], sections["slices"].squeeze(1)
            self._segments[: len(segments)] = segments
            self._segments[len(segments) :] = 0
            self._slices[: len(slices)] = slices
        self._graph.replay()
        return self.result

    def _step(self, forward: Forward, logits: Logits) -> DecodeResult:
        if self.lora is not None:
            self.lora.prepare()
        slots, starts, num_new = self._rows[:, 0], self._rows[:, 1].contiguous(), self._rows[:, 2]
        page_table = self._state.page_table
        pages = page_table[slots, starts // self._page_size]
        inputs = StepInputs(
            num_prefill_rows=0,
            num_prefill_tokens=0,
            max_kv_len=page_table.shape[1] * self._page_size,
            token_ids=self._state.last_tokens(slots),
            positions=starts,
            kv_slots=pages * self._page_size + starts % self._page_size,
            page_table=page_table,
            rows=self._rows,
            slots=slots,
            kv_lens=starts + num_new,
            lora=self.lora,
        )
        row_logits = logits(forward(inputs))
        finite = rows_finite(row_logits)
        tokens = sample_greedy(row_logits)
        self._state.record(slots, tokens, count=False)
        return DecodeResult(row_logits, torch.where(finite, tokens, -1).int())


def num_graph_rows(max_rows: int, *, exchanges_planes: bool, lora: bool) -> int:
    """Of all graphs together; each keeps the float32 logits of its own. 0 if `max_rows` is: no graphs."""
    return sum(_buckets(max_rows)) * len(_bounds(exchanges_planes, lora)) if max_rows else 0


def _buckets(max_rows: int) -> list[int]:
    return [bucket for bucket in BUCKETS if bucket < max_rows] + [max_rows]


def _bounds(exchanges_planes: bool, lora: bool) -> tuple[int, ...]:
    bounds = _BOUNDS_SHARED if exchanges_planes else _BOUNDS_ALONE
    return (0, *bounds) if lora else (0,)


class DecodeGraphs:
    """All graphs of a worker. Every rank captures the same ones in the same order: they hold collectives."""

    def __init__(
        self,
        forward: Forward,
        logits: Logits,
        state: SlotState,
        geometry: PoolGeometry,
        *,
        max_rows: int,
        exchanges_planes: bool,
        lora: bool,
    ) -> None:
        self._forward, self._logits = forward, logits
        self._state, self._geometry = state, geometry
        self._buckets = _buckets(max_rows)
        self._bounds = _bounds(exchanges_planes, lora)
        self._graphs: dict[tuple[int, int], _Graph] = {}

    @torch.inference_mode()
    def capture(self, show_progress: bool) -> None:
        """Capture them, the largest first so that the others fit into its memory."""
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        lender: LoRABatch | None = None
        wanted = [(bucket, bound) for bucket in reversed(self._buckets) for bound in reversed(self._bounds)]
        for bucket, bound in tqdm(wanted, "capturing graphs", disable=not show_progress):
            graph = _Graph(bucket, bound, self._geometry, self._state, lender)
            lender = lender or graph.lora
            graph.capture(self._forward, self._logits, memory, stream)
            self._graphs[bucket, bound] = graph

    def run(self, num_rows: int, max_slices: int, sections: dict[str, torch.Tensor]) -> DecodeResult | None:
        """Replay a step of decode rows; None if no graph is made for it."""
        bucket = next((bucket for bucket in self._buckets if bucket >= num_rows), None)
        bound = next((bound for bound in self._bounds if bound >= max_slices), None)
        if bucket is None or bound is None:
            return None
        return self._graphs[bucket, bound].replay(sections)
