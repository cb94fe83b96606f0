"""Decode steps as CUDA graphs: one per batch bucket, with LoRA and without.

A LoRA graph serves any mix of adapters, ranks and rows without an adapter, since its kernels read their work from memory.
A step is padded to its bucket with rows of no length in the dummy slot. What a step reads is filled in from its plan by one
launch before the replay. Greedy tokens are drawn inside the graph; other ways of drawing go on from its logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from tqdm import tqdm

from manylora.kernels.decode_inputs import Bounds, DecodeInputs
from manylora.kernels.fill_decode_inputs import fill_decode_inputs
from manylora.lora.lora_batch import LoRABatch
from manylora.lora.page_layout import PoolGeometry
from manylora.runtime.plan import SECTIONS, section_bounds
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.step_inputs import StepInputs

BUCKETS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256, 320, 384, 448, 512)
# Planes, and what ranks exchange of them, are as many as the slices a graph has room for. One rank exchanges nothing, so
# one generous bound does; several have graphs for each.
_BOUNDS_ALONE, _BOUNDS_SHARED = (16,), (1, 4, 16)
_WARM_UPS = 2

Forward = Callable[[StepInputs], torch.Tensor]
Logits = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # hidden rows, where to -> logits
_NOTHING = section_bounds([0] * len(SECTIONS))


@dataclass(slots=True)
class DecodeResult:
    """What one replay left, valid until the next replay of any graph: the first rows are the step's."""

    logits: torch.Tensor  # (bucket, vocab) of the model's dtype
    tokens: (
        torch.Tensor
    )  # (bucket,) int32: the greedy draw, in the slots already; -1 where the logits were not finite


class DecodeGraph:
    """One captured step of `bucket` rows with room for `max_slices` slices an adapter (0: no LoRA).

    `lender`: another graph, made before and at least as large, to share memory with.
    """

    def __init__(
        self,
        bucket: int,
        max_slices: int,
        geometry: PoolGeometry,
        state: SlotState,
        lender: DecodeGraph | None,
    ) -> None:
        self._state = state
        self._page_size = geometry.page_size
        self._inputs = DecodeInputs.empty(bucket, max_slices, state.page_table.device)
        self._lora: LoRABatch | None = None
        if max_slices:
            segments, slices = self._inputs.segments, self._inputs.slices
            lent = lender._lora if lender is not None else None
            self._lora = LoRABatch.on_device(
                segments, slices, max_slices, bucket, geometry, lent, captured=True
            )
        self._logits: torch.Tensor | None = None
        if lender is not None and lender._result is not None:
            self._logits = lender._result.logits[:bucket]
        self._graph = torch.cuda.CUDAGraph()
        self._result: DecodeResult | None = None

    def rehearse(self, forward: Forward, logits: Logits) -> None:
        """Run the empty step once."""
        self._fill_with_nothing()
        self._step(forward, logits)

    def capture(self, forward: Forward, logits: Logits, memory: Any, stream: torch.cuda.Stream) -> None:
        """Run the empty step a few times, so that nothing is compiled or allocated late, then capture it."""
        self._fill_with_nothing()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step(forward, logits)
        torch.cuda.current_stream().wait_stream(stream)
        with torch.cuda.graph(self._graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            self._result = self._step(forward, logits)

    def replay(self, payload: torch.Tensor, bounds: Bounds) -> DecodeResult:
        """Take in the plan, its pages included, and launch. payload: int32, on the device."""
        assert self._result is not None
        self._fill(payload, bounds)
        self._graph.replay()
        return self._result

    def _fill_with_nothing(self) -> None:
        self._fill(torch.zeros(1, dtype=torch.int32, device=self._inputs.rows.device), _NOTHING)

    def _fill(self, payload: torch.Tensor, bounds: Bounds) -> None:
        state = self._state
        fill_decode_inputs(
            self._inputs,
            payload,
            bounds,
            state.last_token,
            state.page_table,
            self._page_size,
            state.dummy_slot,
        )

    def _step(self, forward: Forward, logits: Logits) -> DecodeResult:
        if self._lora is not None:
            self._lora.prepare()
        given, page_table = self._inputs, self._state.page_table
        slots = given.rows[:, 0]
        inputs = StepInputs(
            num_prefill_rows=0,
            num_prefill_tokens=0,
            max_kv_len=page_table.shape[1] * self._page_size,
            token_ids=given.token_ids,
            positions=given.positions,
            kv_slots=given.kv_slots,
            page_table=page_table,
            rows=given.rows,
            slots=slots,
            kv_lens=given.kv_lens,
            lora=self._lora,
        )
        row_logits = logits(forward(inputs), self._logits)
        return DecodeResult(row_logits, self._state.draw_greedy(slots, row_logits))


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
        self._graphs: dict[tuple[int, int], DecodeGraph] = {}

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run the empty step of each once, by no graph, taking no index from what a kernel wrote."""
        lender: DecodeGraph | None = None
        for bucket, bound in self._wanted():
            graph = DecodeGraph(bucket, bound, self._geometry, self._state, lender)
            graph.rehearse(self._forward, self._logits)
            lender = lender or graph

    @torch.inference_mode()
    def capture(self, show_progress: bool) -> None:
        """Capture them, the largest first so that the others fit into its memory."""
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        lender: DecodeGraph | None = None
        for bucket, bound in tqdm(self._wanted(), "capturing graphs", disable=not show_progress):
            graph = DecodeGraph(bucket, bound, self._geometry, self._state, lender)
            graph.capture(self._forward, self._logits, memory, stream)
            lender = lender or graph
            self._graphs[bucket, bound] = graph

    def _wanted(self) -> list[tuple[int, int]]:
        return [(bucket, bound) for bucket in reversed(self._buckets) for bound in reversed(self._bounds)]

    def find(self, num_rows: int, max_slices: int) -> DecodeGraph | None:
        """The one for a step of decode rows; None if none is made for it."""
        bucket = next((bucket for bucket in self._buckets if bucket >= num_rows), None)
        bound = next((bound for bound in self._bounds if bound >= max_slices), None)
        return None if bucket is None or bound is None else self._graphs[bucket, bound]
