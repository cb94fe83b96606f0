"""A captured decode step alone, without a server: for choosing where and how its kernels are launched.

    python scripts/bench_step.py --model-shape llama-8b --json step.jsonl [--only B64K64 …]

A row BxKy is a step of x rows with y adapters of rank 16, row after row dealt to them in runs, behind a context of 1090
tokens of random numbers, KV included: zeros are faster to read. Milliseconds a step, two in flight, the median of --runs
times 20 steps. All rows share one model, and the adapters of the row that has most.
"""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import replace

import torch
from bench_common import Bench, Result, make_arguments, run_to_end
from bench_decode import parse_row
from profile_decode import STEPS, WARM_UP_STEPS, Setup, StepShape, build, make_plan, run, use_graphs

ROWS = ("B1K0", "B1K1", "B8K8", "B16K16", "B32K32", "B64K0", "B64K1", "B64K8", "B64K64", "B128K64", "B256K64")
CONTEXT = 1090
COLUMNS = ("step_ms", "spread_ms")


def measure(bench: Bench, whole: Setup, batch: int, num_adapters: int) -> Result:
    """One row, of a setup that has room for it."""
    setup, shape = replace(whole, slices=whole.slices[:num_adapters]), StepShape(batch, 1, CONTEXT)
    plans = [make_plan(setup, shape, step) for step in range(WARM_UP_STEPS + STEPS)]
    use_graphs(setup, batch)
    run(setup.runner, plans[:WARM_UP_STEPS])
    times: list[float] = []
    for _ in range(bench.args.runs):
        started = time.perf_counter()
        run(setup.runner, plans[WARM_UP_STEPS:])
        times.append(1e3 * (time.perf_counter() - started) / STEPS)
    setup.runner.use_graphs(None)
    return {
        "batch": batch,
        "adapters": num_adapters,
        "context": CONTEXT,
        "step_ms": round(statistics.median(times), 3),
        "spread_ms": round(max(times) - min(times), 3),
    }


def main(bench: Bench) -> None:
    rows = {row: parse_row(row) for row in bench.args.only or ROWS}
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    largest = StepShape(max(batch for batch, _ in rows.values()), 1, CONTEXT)
    setup = build(bench, largest, max(adapters for _, adapters in rows.values()), device)
    with torch.inference_mode():
        setup.runner._kv_cache[setup.first_free_page :].normal_()
    for row, (batch, adapters) in rows.items():
        bench.measure(row, lambda batch=batch, adapters=adapters: measure(bench, setup, batch, adapters))
        gc.collect()  # the next row's graphs need the memory
        torch.cuda.empty_cache()


if __name__ == "__main__":
    run_to_end(Bench("step", make_arguments(__doc__), COLUMNS), main)
