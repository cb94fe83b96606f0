"""A ModelRunner by itself, with random weights, adapters in its pages and plans as the scheduler makes them: what the
benchmarks of single steps share.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_common import Bench

from manylora.lora.adapter_file import open_adapter
from manylora.lora.adapter_image import write_image
from manylora.lora.adapter_weights import AdapterWeights, bind_adapter
from manylora.lora.delta import attach_deltas
from manylora.lora.host_arena import HostArena
from manylora.lora.page_layout import AdapterLayout, PoolGeometry, pool_geometry
from manylora.lora.weight_pool import WeightPool
from manylora.runtime.plan import FROM_SLOT, ForwardBatch, PlanBuilder, slot_entry
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.decode_graph import DecodeGraphs
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.memory_pool import PagePool
from manylora.tp_worker.model_runner import ModelRunner, PendingOutput
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.weight_loader import load_model

RANK = 16  # of adapters, where nothing else is said
PAGE_SIZE = 16
WARM_UP_STEPS, STEPS = 10, 20
IN_FLIGHT = 2


def the_device() -> torch.device:
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@dataclass(frozen=True)
class Setup:
    """A rank that is ready to run, and what a plan must know of it. slices: those of each adapter."""

    runner: ModelRunner
    slices: list[list[int]]
    first_free_page: int
    vocab_size: int


@dataclass(frozen=True)
class StepShape:
    """`batch` rows with `new_tokens` new ones each, behind a context of `context` tokens."""

    batch: int
    new_tokens: int
    context: int

    @property
    def row_pages(self) -> int:
        """Pages a row needs to the end of the last step."""
        return -(-(self.context + self.new_tokens * (WARM_UP_STEPS + STEPS)) // PAGE_SIZE)

    def start(self, step: int) -> int:
        """Tokens of a row that step `step` finds in the cache: decoding goes on, prefill starts again."""
        return self.context + step if self.new_tokens == 1 else self.context


class AdapterImage(NamedTuple):
    """An adapter as the loader lays it out."""

    path: Path
    weights: AdapterWeights
    layout: AdapterLayout


def build(bench: Bench, shape: StepShape, ranks: Sequence[int], device: torch.device) -> Setup:
    """Weights, exactly the pages that the steps need, and adapters of these ranks in them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = TPGroup(0, 1, device)
    model = load_model(bench.model, bench.model_dir, "dummy", dtype, device, group, seed=0, progress=False)
    geometry = pool_geometry(
        bench.model, tp_size=1, sharding="slora", page_size=PAGE_SIZE, itemsize=dtype.itemsize
    )
    with tempfile.TemporaryDirectory(prefix="manylora-bench-") as directory:
        images = {
            rank: _write_image(bench, rank, Path(directory) / str(rank), geometry, dtype)
            for rank in set(ranks)
        }
        adapters = [images[rank] for rank in ranks]
        lora_pages = sum(adapter.layout.num_pages for adapter in adapters)
        pool = PagePool(geometry, lora_pages + shape.batch * shape.row_pages, dtype, device)
        pool.elements.zero_()
        state = SlotState(shape.batch, shape.row_pages, bench.model.vocab_size, device)
        runner = ModelRunner(model, pool, state, vocab_size=bench.model.vocab_size, tp_rank=0)
        slices: list[list[int]] = []
        if adapters:
            deltas, slices = _make_resident(pool, geometry, adapters)
            attach_deltas(model, deltas, group, "slora")
    return Setup(runner, slices, lora_pages, bench.model.vocab_size)


def _write_image(
    bench: Bench, rank: int, path: Path, geometry: PoolGeometry, dtype: torch.dtype
) -> AdapterImage:
    with open_adapter(Path(bench.adapter_dir(rank))) as file:
        weights = bind_adapter(file, bench.model, dtype)
        return AdapterImage(path, weights, write_image(path, weights, geometry, dtype))


def _make_resident(
    pool: PagePool, geometry: PoolGeometry, adapters: Sequence[AdapterImage]
) -> tuple[WeightPool, list[list[int]]]:
    """Each in pages and slices of its own, from the first on, through the same host pages; and their slices."""
    host_pages = max(adapter.layout.num_pages for adapter in adapters)
    arena = HostArena(host_pages, geometry.page_bytes, pinned=pool.elements.is_cuda)
    num_slices = sum(adapter.layout.num_slices for adapter in adapters)
    deltas = WeightPool(geometry, pool.elements, num_slices, arena)
    pages, rows = itertools.count(), itertools.count()
    slices: list[list[int]] = []
    for version, (path, weights, layout) in enumerate(adapters):
        deltas.stage(version, str(path), weights.ranks, weights.scalings, range(layout.num_pages), tp_rank=0)
        slices.append(list(itertools.islice(rows, layout.num_slices)))
        deltas.copy(version, list(itertools.islice(pages, layout.num_pages)), slices[-1])
        while deltas.copying:
            deltas.done()
    return deltas, slices


def use_graphs(setup: Setup, max_rows: int) -> None:
    """Capture decode steps of up to so many rows, with adapters if there are any, where that is possible."""
    runner: Any = setup.runner
    if not torch.cuda.is_available():
        return
    graphs = DecodeGraphs(
        runner.model_step,
        runner._model.logits,
        runner._state,
        runner._pool.geometry,
        max_rows=max_rows,
        exchanges_planes=False,
        lora=bool(setup.slices),
    )
    graphs.capture(show_progress=False)
    runner.use_graphs(graphs)


def make_plan(setup: Setup, shape: StepShape, step: int) -> ForwardBatch:
    """Step `step`; the first also takes the slots and deals out all pages. Rows are dealt to adapters in runs."""
    builder = PlanBuilder()
    start, num_new, num_adapters = shape.start(step), shape.new_tokens, len(setup.slices)
    given = [FROM_SLOT] if num_new == 1 else [0] * num_new
    used = -1
    for slot in range(shape.batch):
        builder.add("rows", slot, start, num_new, slot * num_new)
        builder.extend("tokens", given)
        builder.add("samples", slot, start + num_new)
        adapter = slot * num_adapters // shape.batch
        if num_adapters and adapter != used:
            used = adapter
            end = -(-(adapter + 1) * shape.batch // num_adapters)
            first_slice = builder.count("slices")
            builder.add("segments", slot * num_new, end * num_new, first_slice, len(setup.slices[adapter]))
            builder.extend("slices", setup.slices[adapter])
        if step == 0:
            builder.add("slots", *_slot_entry(setup, slot, start))
            first_page = setup.first_free_page + slot * shape.row_pages
            for index in range(shape.row_pages):
                builder.add("pages", slot, index, first_page + index)
    prefill_rows = shape.batch if num_new > 1 else 0
    return builder.build(
        step,
        num_prefill_rows=prefill_rows,
        num_prefill_tokens=prefill_rows * num_new,
        max_kv_len=start + num_new,
        max_slices=max(map(len, setup.slices), default=0),
    )


def _slot_entry(setup: Setup, slot: int, prompt_len: int) -> list[int]:
    params = SamplingParams(temperature=0.0)
    return slot_entry(
        slot,
        params,
        vocab_size=setup.vocab_size,
        seed=0,
        sample_index=0,
        prompt_len=prompt_len,
        last_token=slot % setup.vocab_size,
    )


def run(runner: ModelRunner, plans: Sequence[ForwardBatch]) -> None:
    """Launch them one after another, never more than two ahead of the device, and wait for the last."""
    pending: deque[PendingOutput] = deque()
    for plan in plans:
        launched = runner.execute(plan)
        assert launched is not None
        pending.append(launched)
        if len(pending) > IN_FLIGHT:
            wait(pending.popleft())
    while pending:
        wait(pending.popleft())


def wait(output: PendingOutput) -> None:
    while not output.ready():
        pass
