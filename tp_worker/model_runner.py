"""Executes plans: one upload, the slots' update, one forward, sampling, one download. Nothing waits for the device.

Every rank executes every plan and draws the same tokens; only rank 0 brings the results back.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from manylora.kernels.decode_inputs import Bounds
from manylora.lora.lora_batch import LoRABatch
from manylora.runtime.plan import ForwardBatch, ForwardOutput, section_bounds
from manylora.tp_worker.decode_graph import DecodeGraph, DecodeGraphs
from manylora.tp_worker.logprobs import Logprobs, join_logprobs, raw_logprobs, select_logprobs
from manylora.tp_worker.memory_pool import PagePool
from manylora.tp_worker.piecewise_graph import PiecewiseGraphs
from manylora.tp_worker.sampler import Masks, draw_tokens, only_greedy
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.step_inputs import StepInputs
from manylora.tp_worker.transfers import Columns, Download, Upload

# Tokens of the average row. With fewer, little would be saved for a few launches more: reckoned, not measured.
_NARROWED_FROM = 4
PROMPT_LOGITS_BYTES = 1 << 28  # of fp32 logits that exist at once while prompt logprobs are computed
_OUTSIDE_GRAPHS = (
    "slots",
    "stop_ids",
    "biases",
    "history",
    "copies",
)  # sections that a graph's inputs do not include


class Model(Protocol):
    """What a runner needs of a model (`tp_worker.models.decoder.Decoder` is one)."""

    def forward(self, inputs: StepInputs, kv_cache: torch.Tensor) -> torch.Tensor:
        """Write the step's KV; return the last hidden state after the final norm: (T, hidden), or of the narrowed step's
        rows (R, hidden).
        """
        ...

    def logits(self, hidden_rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(n, hidden) -> (n, vocab) of the same dtype, whole and contiguous on every rank; in `out` where it is given."""
        ...


@dataclass(slots=True)
class PendingOutput:
    """The result of a step that may still run on the device."""

    step: int
    columns: Columns

    def ready(self) -> bool:
        return self.columns.ready()

    def output(self) -> ForwardOutput:
        """Call once `ready`."""
        return ForwardOutput(self.step, **self.columns.to_bytes())


class ModelRunner:
    """One rank's executor. `vocab_size` bounds the chunks of prompt logits."""

    def __init__(
        self, model: Model, pool: PagePool, state: SlotState, *, vocab_size: int, tp_rank: int
    ) -> None:
        self._model = model
        self._pool = pool
        self._kv_cache = pool.kv_view()
        self._state = state
        state.page_table[state.dummy_slot] = pool.dummy_page
        self._page_size = pool.geometry.page_size
        self.dummy_kv_slot = pool.dummy_page * self._page_size  # of KV that nobody reads
        self._prompt_chunk = max(1, PROMPT_LOGITS_BYTES // (4 * vocab_size))
        self._answers = tp_rank == 0
        device = pool.elements.device
        self._upload = Upload(device)
        self._download = Download(device)
        self._graphs: DecodeGraphs | None = None
        self._pieces: PiecewiseGraphs | None = None

    @torch.inference_mode()
    def execute(self, plan: ForwardBatch) -> PendingOutput | None:
        """Launch one step. Returns its coming result on rank 0, None on the others."""
        payload = self._upload(plan.payload)
        bounds = section_bounds(plan.counts)
        graph = self._graph_of(plan)
        if graph and _is_plain(plan):
            columns = {"tokens": graph.replay(payload, bounds).tokens[: plan.num_rows]}
        else:
            columns = self._run(plan, payload, bounds, graph)
        if not self._answers:
            return None
        columns.setdefault("tokens", payload.new_empty(0))
        return PendingOutput(plan.step, self._download(columns))

    def use_graphs(self, graphs: DecodeGraphs | None = None, pieces: PiecewiseGraphs | None = None) -> None:
        """Run decode steps by these graphs from now on, and others by these pieces, where they have some."""
        self._graphs, self._pieces = graphs, pieces

    def model_step(self, inputs: StepInputs) -> torch.Tensor:
        """The forward over this runner's cache: what a graph captures."""
        return self._model.forward(inputs, self._kv_cache)

    def _graph_of(self, plan: ForwardBatch) -> DecodeGraph | None:
        """The graph for a step of nothing but decode rows, if there is one."""
        if self._graphs is None or plan.num_prefill_rows:
            return None
        return self._graphs.find(plan.num_rows, plan.max_slices)

    def _run(
        self, plan: ForwardBatch, payload: torch.Tensor, bounds: Bounds, graph: DecodeGraph | None
    ) -> dict[str, torch.Tensor]:
        """Any step, by `graph` as far as that goes."""
        wide = payload[: plan.payload_size].long()  # the masks behind the sections stay as they are
        sections = {name: _view(wide, *bound) for name, bound in bounds.items()}
        self._state.apply(sections)
        if plan.count("copies"):
            self._pool.copy_pages(sections["copies"])
        masks = _masks(plan, payload, sections)
        if graph is None:
            return self._forward(plan, sections, masks)
        result = graph.replay(payload, bounds)
        if _takes_best(plan):
            return {"tokens": result.tokens[: plan.num_rows]}
        return self._sample(plan, sections, result.logits[: plan.num_rows], masks)

    def _forward(
        self, plan: ForwardBatch, sections: dict[str, torch.Tensor], masks: Masks | None
    ) -> dict[str, torch.Tensor]:
        """A step of any rows, operation by operation, or by pieces of a graph."""
        pieces = self._pieces.find(plan.num_tokens, plan.max_slices) if self._pieces else None
        if pieces is None:
            inputs = self._step_inputs(plan, sections, self._lora_batch(plan, sections))
            if plan.num_tokens >= _NARROWED_FROM * plan.num_rows and not plan.count("prompt_lps"):
                inputs.narrow()
            hidden = self.model_step(inputs)
        else:
            inputs = self._step_inputs(plan, sections, None)
            hidden = pieces.run(inputs, sections["segments"], sections["slices"].squeeze(1))
        columns: dict[str, torch.Tensor] = {}
        if plan.count("samples"):
            wanted = sections["samples"][:, 0]
            if inputs.narrowed is None:
                _, _, num_new, offsets = sections["rows"][wanted].unbind(1)
                wanted = offsets + num_new - 1
            columns |= self._sample(plan, sections, self._model.logits(hidden[wanted]), masks)
        if plan.count("prompt_lps"):
            columns |= self._prompt_logprobs(plan, sections["prompt_lps"], hidden)
        return columns

    def _lora_batch(self, plan: ForwardBatch, sections: dict[str, torch.Tensor]) -> LoRABatch | None:
        if not plan.max_slices:
            return None
        segments, slices = sections["segments"], sections["slices"].squeeze(1)
        if not segments.is_cuda:
            return LoRABatch(segments, slices, plan.max_slices)
        geometry = self._pool.geometry
        batch = LoRABatch.on_device(segments, slices, plan.max_slices, plan.num_tokens, geometry)
        batch.prepare()
        return batch

    def _step_inputs(
        self,
        plan: ForwardBatch,
        sections: dict[str, torch.Tensor],
        lora: LoRABatch | None,
    ) -> StepInputs:
        slots, starts, num_new, offsets = sections["rows"].unbind(1)
        row_ids = torch.arange(plan.num_rows, device=slots.device)
        row = torch.repeat_interleave(row_ids, num_new, output_size=plan.num_tokens)
        positions = torch.arange(plan.num_tokens, device=slots.device) + (starts - offsets)[row]
        page_table = self._state.page_table
        pages = page_table[slots[row], positions // self._page_size]
        given = sections["tokens"].squeeze(1)
        return StepInputs(
            num_prefill_rows=plan.num_prefill_rows,
            num_prefill_tokens=plan.num_prefill_tokens,
            max_kv_len=plan.max_kv_len,
            token_ids=torch.where(given >= 0, given, self._state.last_tokens(slots)[row]),
            positions=positions,
            kv_slots=pages * self._page_size + positions % self._page_size,
            page_table=page_table,
            rows=sections["rows"],
            slots=slots,
            kv_lens=starts + num_new,
            lora=lora,
        )

    def _sample(
        self,
        plan: ForwardBatch,
        sections: dict[str, torch.Tensor],
        logits: torch.Tensor,
        masks: Masks | None,
    ) -> dict[str, torch.Tensor]:
        """Draw the plan's samples from their logits (n, vocab) of any dtype, which are overwritten."""
        row, positions = sections["samples"].unbind(1)
        slots = sections["rows"][row, 0]
        wanted = self._answers and plan.num_top >= 0
        logprobs = raw_logprobs(logits) if wanted else None  # before sampling overwrites the logits
        columns = {"tokens": draw_tokens(plan, logits, self._state, slots, positions, masks)}
        if logprobs is not None:
            drawn = self._state.last_tokens(slots)  # valid ids, whatever the logits
            selected = select_logprobs(logprobs, drawn, plan.num_top)
            columns |= {
                "logprobs": selected.chosen,
                "top_ids": selected.top_ids,
                "top_logprobs": selected.top,
            }
        return columns

    def _prompt_logprobs(
        self, plan: ForwardBatch, entries: torch.Tensor, hidden: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        parts: list[Logprobs] = []
        for chunk in entries.split(self._prompt_chunk):
            index, token, _ = chunk.unbind(1)
            logits = self._model.logits(hidden[index])  # on every rank: it gathers
            if self._answers:
                parts.append(select_logprobs(raw_logprobs(logits), token, plan.num_prompt_top))
        if not parts:
            return {}
        whole = join_logprobs(parts)
        return {
            "prompt_logprobs": whole.chosen,
            "prompt_top_ids": whole.top_ids,
            "prompt_top_logprobs": whole.top,
        }


def _takes_best(plan: ForwardBatch) -> bool:
    """Whether the greedy draw of a graph is all that is asked for."""
    return only_greedy(plan) and plan.num_top < 0


def _is_plain(plan: ForwardBatch) -> bool:
    """Whether a decode graph takes in all that the plan says and draws all that it asks for."""
    return _takes_best(plan) and not any(plan.count(section) for section in _OUTSIDE_GRAPHS)


def _masks(plan: ForwardBatch, payload: torch.Tensor, sections: dict[str, torch.Tensor]) -> Masks | None:
    if not plan.count("masked"):
        return None
    words = payload[plan.payload_size :].view(plan.count("masked"), -1)
    return Masks(sections["masked"].squeeze(1), words)


def _view(packed: torch.Tensor, start: int, count: int, width: int) -> torch.Tensor:
    return packed[start : start + count * width].view(count, width)
