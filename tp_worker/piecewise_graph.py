"""Short steps that no decode graph is for, as pieces of CUDA graphs that are cut where a layer attends.

Launched one by one, the kernels of such a step keep the host busy longer than the GPU (docs/benchmarks.md). How attention
is launched depends on how the tokens fall into rows, so it stays outside; everything else depends on how many tokens there
are, which is rounded up to a bucket. Padding tokens belong to no row and no adapter; their KV goes to the dummy page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from manylora.lora.lora_batch import LoRABatch
from manylora.lora.page_layout import PoolGeometry
from manylora.tp_worker.layers.attention import attend
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.step_inputs import StepInputs

BUCKETS = (32, 64, 128, 256, 384, 512, 768, 1024)  # tokens; longer steps are bound by the GPU
LARGEST_BUCKET = BUCKETS[-1]
_MAX_SLICES = 16  # of an adapter; with one rank a generous bound costs nothing

Forward = Callable[[StepInputs], Tensor]


class _Buffers:
    """What all pieces share: queries and what they attend to, each (T, heads, head_dim), and the result (T, hidden)."""

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens
        self._queries = self._attended = self.hidden = torch.empty(0)

    def give(self, hidden: Tensor) -> None:
        """Keep a step's result."""
        if not len(self.hidden):
            self.hidden = hidden.new_empty((self._num_tokens, hidden.shape[1]))
        self.hidden[: len(hidden)].copy_(hidden)

    def take(self, queries: Tensor) -> Tensor:
        """Keep the queries of a step; returns where what they attend to will lie."""
        if not len(self._queries):
            shape = (self._num_tokens, *queries.shape[1:])
            self._queries, self._attended = queries.new_zeros(shape), queries.new_zeros(shape)
        self._queries[: len(queries)].copy_(queries)
        return self._attended[: len(queries)]

    def attend(self, inputs: StepInputs, kv_cache: Tensor, scale: float) -> None:
        """With the queries of the step's own tokens."""
        num_tokens = len(inputs.token_ids)
        attend(self._queries[:num_tokens], inputs, kv_cache, scale, self._attended[:num_tokens])


class PiecewiseGraph:
    """The step of `num_tokens` tokens, with room for adapters or (`lora` false) for none.

    `lender`: another of these, made before and at least as large, to share memory with.
    """

    def __init__(
        self,
        num_tokens: int,
        lora: bool,
        geometry: PoolGeometry,
        state: SlotState,
        dummy_kv_slot: int,
        buffers: _Buffers,
        lender: PiecewiseGraph | None,
    ) -> None:
        device = state.page_table.device
        self._padding = torch.zeros((3, num_tokens), dtype=torch.int64, device=device)
        self._padding[2] = dummy_kv_slot
        self._given = self._padding.clone()  # token ids, positions, KV slots
        self._state = state
        self._buffers = buffers
        self._lora: LoRABatch | None = None
        if lora:
            num_segments = min(num_tokens, state.dummy_slot)
            segments = torch.zeros((num_segments, 4), dtype=torch.int64, device=device)
            slices = torch.zeros(num_segments * _MAX_SLICES, dtype=torch.int64, device=device)
            lent = lender._lora if lender is not None else None
            self._lora = LoRABatch.on_device(
                segments, slices, _MAX_SLICES, num_tokens, geometry, lent, captured=True
            )
        self._pieces: list[torch.cuda.CUDAGraph] = []
        self._cuts: list[tuple[Tensor, float]] = []  # a layer's cache, and the scale it attends with

    def rehearse(self, forward: Forward) -> None:
        """Run an empty step outside of any graph, without attention."""
        self._forward(forward, lambda queries, *_: self._buffers.take(queries))

    def capture(self, forward: Forward, memory: Any, stream: torch.cuda.Stream) -> None:
        """Run an empty step, so that nothing is compiled or allocated late, then capture it."""

        def begin() -> None:
            self._pieces.append(torch.cuda.CUDAGraph())
            self._pieces[-1].capture_begin(pool=memory, capture_error_mode="thread_local")

        def cut(queries: Tensor, kv_cache: Tensor, scale: float) -> Tensor:
            attended = self._buffers.take(queries)
            self._pieces[-1].capture_end()
            self._cuts.append((kv_cache, scale))
            begin()
            return attended

        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.rehearse(forward)
            begin()
            self._forward(forward, cut)
            self._pieces[-1].capture_end()
        torch.cuda.current_stream().wait_stream(stream)

    def run(self, inputs: StepInputs, segments: Tensor, slices: Tensor) -> Tensor:
        """The forward of a step: (T, hidden), valid until the next step by pieces.

        inputs: of at most `num_tokens` tokens; segments (n, 4) and slices (m,) int64 as `LoRABatch` has them.
        """
        num_tokens = len(inputs.token_ids)
        self._given.copy_(self._padding)
        self._given[:, :num_tokens] = torch.stack((inputs.token_ids, inputs.positions, inputs.kv_slots))
        if self._lora is not None:
            self._lora.segments.zero_()
            self._lora.segments[: len(segments)] = segments
            self._lora.slices[: len(slices)] = slices
        self._replay(inputs)
        return self._buffers.hidden[:num_tokens]

    def _replay(self, inputs: StepInputs) -> None:
        for piece, (kv_cache, scale) in zip(self._pieces[:-1], self._cuts, strict=True):
            piece.replay()
            self._buffers.attend(inputs, kv_cache, scale)
        self._pieces[-1].replay()

    def _forward(self, forward: Forward, cut: Callable[[Tensor, Tensor, float], Tensor]) -> None:
        if self._lora is not None:
            self._lora.prepare()
        token_ids, positions, kv_slots = self._given
        nothing = self._padding[0]  # attention alone would read it
        hidden = forward(
            StepInputs(
                num_prefill_rows=0,
                num_prefill_tokens=0,
                max_kv_len=0,
                token_ids=token_ids,
                positions=positions,
                kv_slots=kv_slots,
                page_table=self._state.page_table,
                rows=nothing,
                slots=nothing,
                kv_lens=nothing,
                lora=self._lora,
                attend=cut,
            )
        )
        self._buffers.give(hidden)


class PiecewiseGraphs:
    """All that a worker has, if there are no other ranks. max_tokens: the most that a step can have."""

    def __init__(
        self,
        forward: Forward,
        state: SlotState,
        geometry: PoolGeometry,
        *,
        max_tokens: int,
        dummy_kv_slot: int,
        lora: bool,
    ) -> None:
        self._forward = forward
        enough = next((bucket for bucket in BUCKETS if bucket >= max_tokens), LARGEST_BUCKET)
        self._buckets = [bucket for bucket in BUCKETS if bucket <= enough]
        self._with_lora = (True, False) if lora else (False,)
        self._geometry, self._state, self._dummy_kv_slot = geometry, state, dummy_kv_slot
        self._buffers = _Buffers(self._buckets[-1])
        self._graphs: dict[tuple[int, bool], PiecewiseGraph] = {}

    @torch.inference_mode()
    def rehearse(self) -> None:
        """Run the empty step of each once, by no graph, taking no index from what a kernel wrote."""
        lender: PiecewiseGraph | None = None
        for bucket, lora in self._wanted():
            graph = self._make(bucket, lora, lender)
            graph.rehearse(self._forward)
            lender = lender or graph

    @torch.inference_mode()
    def capture(self, show_progress: bool) -> None:
        """Capture them, the largest first: mostly the others fit into its memory."""
        torch.cuda.empty_cache()  # of the rehearsal; nothing can be given back while a graph is captured
        memory = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream()
        lender: PiecewiseGraph | None = None
        for bucket, lora in tqdm(self._wanted(), "capturing pieces", disable=not show_progress):
            graph = self._make(bucket, lora, lender)
            graph.capture(self._forward, memory, stream)
            lender = lender or graph
            self._graphs[bucket, lora] = graph

    def find(self, num_tokens: int, max_slices: int) -> PiecewiseGraph | None:
        """The one for a step of so many tokens, with adapters of so many slices, 0: without; None if none is made for it."""
        bucket = next((bucket for bucket in self._buckets if bucket >= num_tokens), None)
        if bucket is None or max_slices > _MAX_SLICES:
            return None
        return self._graphs[bucket, max_slices > 0]

    def _wanted(self) -> list[tuple[int, bool]]:
        return [(bucket, lora) for bucket in reversed(self._buckets) for lora in self._with_lora]

    def _make(self, bucket: int, lora: bool, lender: PiecewiseGraph | None) -> PiecewiseGraph:
        return PiecewiseGraph(
            bucket, lora, self._geometry, self._state, self._dummy_kv_slot, self._buffers, lender
        )
