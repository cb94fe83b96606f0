"""Short steps with prompts: launched kernel by kernel, and as pieces of CUDA graphs, as a worker runs them.

    python scripts/bench_short_steps.py --model-shape llama-8b --json short.jsonl [--only 4x50K4 …]

A row 4x50K4 is a step of 4 prompts of 50 tokens behind a context of 1000, with 4 adapters of rank 16. Milliseconds from the
plan to its result, one step at a time, without a server; the median of --runs times 20 steps, the two ways in turns.
"""

from __future__ import annotations

import re
import statistics
import time

import torch
from bench_common import Bench, Result, make_arguments, run_to_end
from bench_runner import PAGE_SIZE, RANK, Setup, StepShape, build, make_plan, the_device, wait

from manylora.tp_worker.piecewise_graph import LARGEST_BUCKET, PiecewiseGraphs

ROWS = (
    "1x20K0",
    "1x20K1",
    "4x8K4",
    "1x100K0",
    "1x100K1",
    "4x50K0",
    "4x50K4",
    "2x250K0",
    "2x250K2",
    "8x125K0",
    "8x125K4",
)
CONTEXT = 1000
WARM_UP_STEPS, STEPS = 5, 20
COLUMNS = ("one_by_one_ms", "pieces_ms")


def parse_row(row: str) -> tuple[StepShape, int]:
    """ "4x50K4" -> the step's shape and how many adapters it has. Raises ValueError."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)K(\d+)", row)
    if match is None or int(match[2]) < 2 or int(match[3]) > int(match[1]):
        raise ValueError(f"{row} is no row: <prompts>x<tokens, at least 2>K<adapters, at most one a prompt>")
    return StepShape(int(match[1]), int(match[2]), CONTEXT), int(match[3])


def time_steps(setup: Setup, shape: StepShape, first_step: int) -> float:
    """Milliseconds of one step, the median."""
    times: list[float] = []
    for step in range(first_step, first_step + WARM_UP_STEPS + STEPS):
        plan = make_plan(setup, shape, step)
        started = time.perf_counter()
        launched = setup.runner.execute(plan)
        assert launched is not None
        wait(launched)
        times.append(1e3 * (time.perf_counter() - started))
    return statistics.median(times[WARM_UP_STEPS:])


def measure(bench: Bench, row: str) -> Result:
    shape, num_adapters = parse_row(row)
    setup = build(bench, shape, [RANK] * num_adapters, device := the_device())
    runner = setup.runner
    ways: dict[str, PiecewiseGraphs | None] = {"one_by_one_ms": None}
    if device.type == "cuda" and shape.batch * shape.new_tokens <= LARGEST_BUCKET:
        pieces = PiecewiseGraphs(
            runner.model_step,
            runner._state,
            runner._pool.geometry,
            max_tokens=shape.batch * shape.new_tokens,
            dummy_kv_slot=runner.dummy_kv_slot,
            lora=num_adapters > 0,
        )
        time_steps(setup, shape, 0)  # compiles, and takes the slots
        pieces.capture(show_progress=False)
        ways["pieces_ms"] = pieces
    medians: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(bench.args.runs):
        for way, used in ways.items():
            runner.use_graphs(None, used)
            medians[way].append(time_steps(setup, shape, turn))
    times = {way: round(statistics.median(values), 2) for way, values in medians.items()}
    return {
        "prompts": shape.batch,
        "tokens": shape.new_tokens,
        "adapters": num_adapters,
        "page": PAGE_SIZE,
        **times,
    }


def main(bench: Bench) -> None:
    for row in bench.args.only or ROWS:
        bench.measure(row, lambda row=row: measure(bench, row))
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_to_end(Bench("short_steps", make_arguments(__doc__), COLUMNS), main)
