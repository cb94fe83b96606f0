"""A captured decode step alone, without a server: what adapters of which ranks cost, and for choosing how kernels are launched.

    python scripts/bench_step.py --model-shape llama-8b --json step.jsonl [--only B64K64 …]

A row B32K16 is a step of 32 rows with 16 adapters of rank 16, B32K16r8+64 one with adapters of rank 8 and 64 in turn; rows
are dealt to adapters in runs. The context is 1090 tokens of random numbers, KV included: zeros are faster to read.
Milliseconds a step, two in flight, the median of --runs times 20 steps, every run with a capture of its own, since captures of
one step have been seen to differ: look at the slowest. The floor is that of bench_decode.py. All rows share one model, and
adapters in its pages.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from bench_common import Bench, Result, make_arguments, rounded, run_to_end
from bench_decode import add_floor_arguments, floor_of, parse_row
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

ROWS = (
    *("B1K0", "B1K1", "B8K8", "B16K16", "B32K0", "B32K32", "B64K0", "B64K1", "B64K8", "B64K64"),
    *("B128K64", "B256K64", "B32K32r8", "B32K32r8+64", "B32K32r64"),
)
CONTEXT = 1090
COLUMNS = ("step_ms", "slowest_ms", "floor_ms", "ratio")


def parse(row: str) -> tuple[int, list[int]]:
    """ "B4K3r8+64" -> 4, [8, 64, 8]. Raises ValueError."""
    size, _, ranks = row.partition("r")
    batch, num_adapters = parse_row(size)
    in_turn = itertools.cycle([int(rank) for rank in ranks.split("+")] if ranks else [RANK])
    return batch, list(itertools.islice(in_turn, num_adapters))


def measure(bench: Bench, setup: Setup, batch: int, ranks: Sequence[int]) -> Result:
    """One row; the setup's adapters are those of the row."""
    shape = StepShape(batch, 1, CONTEXT)
    plans = [make_plan(setup, shape, step) for step in range(WARM_UP_STEPS + STEPS)]
    times: list[float] = []
    for _ in range(bench.args.runs):
        use_graphs(setup, batch)
        run(setup.runner, plans[:WARM_UP_STEPS])
        started = time.perf_counter()
        run(setup.runner, plans[WARM_UP_STEPS:])
        times.append(1e3 * (time.perf_counter() - started) / STEPS)
        setup.runner.use_graphs(None)
        gc.collect()  # the next graphs need the memory
        torch.cuda.empty_cache()
    context = CONTEXT + WARM_UP_STEPS + STEPS / 2
    step_ms = round(statistics.median(times), 3)
    return {
        "batch": batch,
        "ranks": Counter(ranks),
        "context": context,
        "step_ms": step_ms,
        "slowest_ms": round(max(times), 3),
        "runs_ms": rounded(times),
        **floor_of(bench, step_ms, batch, context, sum(ranks)),
    }


def adapters_of(setup: Setup, places: Mapping[int, int], ranks: Sequence[int]) -> Setup:
    """The setup with a row's adapters alone. places: rank -> the first adapter of that rank."""
    used: Counter[int] = Counter()
    slices: list[list[int]] = []
    for rank in ranks:
        slices.append(setup.slices[places[rank] + used[rank]])
        used[rank] += 1
    return replace(setup, slices=slices)


def main(bench: Bench) -> None:
    rows = {row: parse(row) for row in bench.args.only or ROWS}
    most: Counter[int] = Counter()
    for _, ranks in rows.values():
        most |= Counter(ranks)
    places = dict(zip(most, itertools.accumulate(most.values(), initial=0), strict=False))
    largest = StepShape(max(batch for batch, _ in rows.values()), 1, CONTEXT)
    setup = build(bench, largest, list(most.elements()), the_device())
    with torch.inference_mode():
        setup.runner._kv_cache[setup.first_free_page :].normal_()
    for row, (batch, ranks) in rows.items():
        mine = adapters_of(setup, places, ranks)
        bench.measure(row, lambda mine=mine, batch=batch, ranks=ranks: measure(bench, mine, batch, ranks))


if __name__ == "__main__":
    parser = make_arguments(__doc__)
    add_floor_arguments(parser)
    run_to_end(Bench("step", parser, COLUMNS), main)
