"""Where the time of a step goes: per class of kernel, and how long the device waits.

    python scripts/profile_decode.py --model-shape llama-8b [--batch 64] [--adapters 0 64] [--json profile.jsonl] [--names]

Builds a ModelRunner with random weights, CUDA graphs and rank-16 adapters in its pages, as a worker does but without a
server, and runs decode steps of B rows at a context of 1090 tokens, two in flight. `us` is device time per step summed
over a class; kernels of two streams overlap, so the classes may add up to more than `busy`, the time in which anything
ran. `--new-tokens 1024 --context 0 --batch 8` profiles prefill steps of 8192 tokens instead.
"""

from __future__ import annotations

import argparse
import gc
import re
import tempfile
import time
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from bench_common import Bench, Result, make_arguments, run_to_end
from torch.profiler import ProfilerActivity, profile

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

RANK = 16
PAGE_SIZE = 16
WARM_UP_STEPS, STEPS = 10, 20
IN_FLIGHT = 2
# The first pattern that a kernel's (on a CPU: an operation's) name contains decides its class.
CLASSES = {
    "lora_shrink": r"lora_shrink",
    "lora_expand": r"lora_expand",
    "lora_work": r"list_work",
    "attention": r"^_(decode|combine|prefill)|attention",
    "norm": r"rms_norm",
    "rope": r"rope_and_store",
    "gate": r"silu",
    "gemm": r"^_linear|gemm|gemv|cutlass|nvjet|cublas|sm90_|splitk|aten::(mm|addmm|bmm)",
    "collective": r"nccl|all_?(reduce|gather)",
    "sampling": r"sample|greedy|argmax|uniform|reduce",
    "inputs": r"fill_decode_inputs",
    "copy": r"memcpy|memset|copy",
    "index": r"index|gather|scatter",
}
OTHER = "other"
COLUMNS = ("step_us", "busy_us", "idle", *CLASSES, OTHER)


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


def build(bench: Bench, shape: StepShape, num_adapters: int, device: torch.device) -> Setup:
    """Weights, exactly the pages that the steps need, and the adapters in them."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    group = TPGroup(0, 1, device)
    model = load_model(bench.model, bench.model_dir, "dummy", dtype, device, group, seed=0, progress=False)
    geometry = pool_geometry(
        bench.model, tp_size=1, sharding="slora", page_size=PAGE_SIZE, itemsize=dtype.itemsize
    )
    with tempfile.TemporaryDirectory(prefix="manylora-profile-") as directory:
        image = Path(directory) / "image"
        with open_adapter(Path(bench.adapter_dir(RANK))) as file:
            weights = bind_adapter(file, bench.model, dtype)
            layout = write_image(image, weights, geometry, dtype)
        lora_pages = num_adapters * layout.num_pages
        pool = PagePool(geometry, lora_pages + shape.batch * shape.row_pages, dtype, device)
        pool.elements.zero_()
        state = SlotState(shape.batch, shape.row_pages, bench.model.vocab_size, device)
        runner = ModelRunner(model, pool, state, vocab_size=bench.model.vocab_size, tp_rank=0)
        slices: list[list[int]] = []
        if num_adapters:
            deltas = _make_resident(pool, geometry, image, weights, layout, num_adapters)
            slices = [
                list(range(index * layout.num_slices, (index + 1) * layout.num_slices))
                for index in range(num_adapters)
            ]
            attach_deltas(model, deltas, group, "slora")
    return Setup(runner, slices, lora_pages, bench.model.vocab_size)


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


def _make_resident(
    pool: PagePool,
    geometry: PoolGeometry,
    image: Path,
    weights: AdapterWeights,
    layout: AdapterLayout,
    count: int,
) -> WeightPool:
    """The same adapter `count` times, each in pages and slices of its own, through one host copy."""
    arena = HostArena(layout.num_pages, geometry.page_bytes, pinned=pool.elements.is_cuda)
    deltas = WeightPool(geometry, pool.elements, count * layout.num_slices, arena)
    for version in range(count):
        deltas.stage(version, str(image), weights.ranks, weights.scalings, range(layout.num_pages), tp_rank=0)
        pages = range(version * layout.num_pages, (version + 1) * layout.num_pages)
        deltas.copy(version, pages, range(version * layout.num_slices, (version + 1) * layout.num_slices))
        while deltas.copying:
            deltas.done()
    return deltas


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


def class_of(name: str) -> str:
    return next((label for label, pattern in CLASSES.items() if re.search(pattern, name, re.I)), OTHER)


def profiled(setup: Setup, plans: Sequence[ForwardBatch], names: bool) -> Result:
    """Microseconds per step: of each class, of any, of all."""
    on_cuda = torch.cuda.is_available()
    activity = ProfilerActivity.CUDA if on_cuda else ProfilerActivity.CPU
    with profile(activities=[activity]) as recorded:
        started = time.perf_counter()
        run(setup.runner, plans)
        seconds = time.perf_counter() - started
    wanted = "CUDA" if on_cuda else "CPU"
    events = [event for event in recorded.events() or () if event.device_type.name == wanted]
    per_class: Counter[str] = Counter()
    per_name: Counter[str] = Counter()
    for event in events:
        spent = event.device_time_total if on_cuda else event.self_cpu_time_total
        per_class[class_of(event.name)] += spent
        per_name[event.name] += spent
    busy = union((event.time_range.start, event.time_range.end) for event in events)
    if names:
        for name, spent in per_name.most_common():
            print(f"{spent / len(plans):10.1f} us  {class_of(name):12} {name}")
    step_us = 1e6 * seconds / len(plans)
    return {
        "step_us": round(step_us, 1),
        "busy_us": round(busy / len(plans), 1),
        "idle": round(1 - busy / len(plans) / step_us, 4),
        **{label: round(per_class[label] / len(plans), 1) for label in (*CLASSES, OTHER)},
    }


def union(intervals: Iterable[tuple[float, float]]) -> float:
    """The length of what the (start, end) pairs cover together."""
    covered, reached = 0.0, float("-inf")
    for start, end in sorted(intervals):
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return covered


def measure(bench: Bench, num_adapters: int) -> Result:
    """One row of the results."""
    args = bench.args
    shape = StepShape(args.batch, args.new_tokens, args.context)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    setup = build(bench, shape, num_adapters, device)
    if shape.new_tokens == 1:
        use_graphs(setup, shape.batch)
    plans = [make_plan(setup, shape, step) for step in range(WARM_UP_STEPS + STEPS)]
    run(setup.runner, plans[:WARM_UP_STEPS])
    result = profiled(setup, plans[WARM_UP_STEPS:], args.names)
    return {"batch": shape.batch, "adapters": num_adapters, "context": shape.context, **result}


def main(bench: Bench) -> None:
    for count in bench.args.adapters:
        row = f"B{bench.args.batch}K{count}"
        if bench.wants(row):
            bench.measure(row, lambda count=count: measure(bench, count))
            gc.collect()  # the next row needs the memory
            torch.cuda.empty_cache()


def parser() -> argparse.ArgumentParser:
    made = make_arguments(__doc__)
    made.add_argument("--batch", type=int, default=64, help="rows of a step (default: 64)")
    made.add_argument(
        "--adapters", type=int, nargs="+", default=[0, 64], help="distinct adapters (default: 0 64)"
    )
    made.add_argument(
        "--context", type=int, default=1090, help="tokens in the cache of each row (default: 1090)"
    )
    made.add_argument(
        "--new-tokens", type=int, default=1, help="tokens of a row in a step; 1: decode (default)"
    )
    made.add_argument("--names", action="store_true", help="also print the time of every kernel by name")
    return made


if __name__ == "__main__":
    run_to_end(Bench("profile", parser(), COLUMNS), main)
