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
import time
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from bench_common import Bench, Result, make_arguments, run_to_end
from bench_runner import (
    RANK,
    STEPS,
    WARM_UP_STEPS,
    Setup,
    StepShape,
    build,
    make_plan,
    run,
    the_device,
    use_graphs,
)
from torch.profiler import ProfilerActivity, profile

from manylora.runtime.plan import ForwardBatch

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
    setup = build(bench, shape, [RANK] * num_adapters, the_device())
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
