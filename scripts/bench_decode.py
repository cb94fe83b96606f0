"""The decode step against its memory floor, over batch sizes B and numbers of distinct adapters K.

    python scripts/bench_decode.py --model-shape llama-8b --json decode.jsonl [--only B64K64 …] [--all]

A step counts while all B rows decode: the mean from the last first token to the first finish, median of the runs; one
run before them does not count. Prompts of 1024 tokens, 128 new ones, row i uses adapter i mod K. The floor is what the
step must read (weights, KV of the batch at the window's mean context, each distinct adapter once) over --bandwidth, the
base products at --gemm if that takes longer. One engine serves all rows. Any row BxKy may be asked for.
"""

from __future__ import annotations

import argparse
import re

from bench_common import WARM_UP_TOKENS, Bench, Result, make_arguments, median_of, rounded, run_to_end
from bench_model import floor_ms
from bench_stream import time_batch

from manylora import Engine

PROMPT_TOKENS, NEW_TOKENS = 1024, 128
MAX_ADAPTERS = 64
ROWS = ["B1K0", "B64K0", "B256K0", "B1K1", "B8K8", "B32K32", "B64K64", "B256K64"]
ALL_ROWS = [
    f"B{batch}K{adapters}"
    for batch in (1, 8, 32, 64, 128, 256)
    for adapters in sorted({min(batch, adapters) for adapters in (0, 1, 8, MAX_ADAPTERS)})
]
COLUMNS = ("step_ms", "spread_ms", "floor_ms", "ratio", "tokens_per_s", "first_tokens_s")


def parse_row(row: str) -> tuple[int, int]:
    """ "B64K8" -> (64, 8). Raises ValueError."""
    match = re.fullmatch(r"B([1-9]\d*)K(\d+)", row)
    if match is None or int(match[2]) > min(int(match[1]), MAX_ADAPTERS):
        raise ValueError(f"{row} is no row: B<rows>K<adapters>, at most {MAX_ADAPTERS} and one a row")
    return int(match[1]), int(match[2])


def measure(bench: Bench, engine: Engine, batch: int, num_adapters: int) -> Result:
    """One row of the results."""
    length, new_tokens = bench.shape.scaled(PROMPT_TOKENS), bench.shape.scaled(NEW_TOKENS)
    adapters = [name_of(row % num_adapters) if num_adapters else None for row in range(batch)]
    time_batch(engine, bench.prompts(batch, length), adapters, min(WARM_UP_TOKENS, new_tokens))
    runs = [
        time_batch(engine, bench.prompts(batch, length), adapters, new_tokens) for _ in range(bench.args.runs)
    ]
    step_ms = median_of(steps := [run.step_ms for run in runs])
    context = median_of([run.context for run in runs], 1)
    return {
        "batch": batch,
        "adapters": num_adapters,
        "rank": bench.args.rank,
        "prompt_tokens": length,
        "new_tokens": new_tokens,
        "context": context,
        "step_ms": step_ms,
        "spread_ms": round(max(steps) - min(steps), 3),
        **floor_of(bench, step_ms, batch, context, num_adapters * bench.args.rank),
        "tokens_per_s": round(1e3 * batch / step_ms, 1),
        "first_tokens_s": median_of([run.first_tokens_s for run in runs]),
        "runs_ms": rounded(steps),
        "steps": [run.steps for run in runs],
    }


def floor_of(bench: Bench, step_ms: float, batch: int, context: float, ranks: int) -> Result:
    """The step's floor, and how many of it were measured. ranks: the sum over its adapters."""
    rates = {"bandwidth": bench.args.bandwidth * 1e12, "flops": bench.args.gemm * 1e12}
    floor = floor_ms(bench.model, batch, context, ranks, **rates)
    return {"floor_ms": float(f"{floor:.4g}"), "ratio": round(step_ms / floor, 3)}


def add_floor_arguments(parser: argparse.ArgumentParser) -> None:
    """What the floor is made of."""
    parser.add_argument("--bandwidth", type=float, default=4.26, help="TB/s; default: measured on an H200")
    parser.add_argument("--gemm", type=float, default=796.0, help="TFLOP/s; default: measured on an H200")


def name_of(index: int) -> str:
    return f"adapter{index}"


def main(bench: Bench) -> None:
    rows = bench.args.only or (ALL_ROWS if bench.args.all else ROWS)
    sizes = {row: parse_row(row) for row in rows}
    most = max(adapters for _, adapters in sizes.values())
    flags = {"enable_lora": True, "max_loras_per_batch": MAX_ADAPTERS, "disable_radix_cache": True}
    with bench.start_engine(**flags) as engine:
        bench.load_adapters(engine, map(name_of, range(most)), bench.args.rank)
        for row, (batch, adapters) in sizes.items():
            bench.measure(row, lambda batch=batch, adapters=adapters: measure(bench, engine, batch, adapters))


if __name__ == "__main__":
    parser = make_arguments(__doc__)
    parser.add_argument(
        "--all", action="store_true", help="every B and K, not only the rows of docs/benchmarks.md"
    )
    parser.add_argument("--rank", type=int, default=16, help="of every adapter (default: 16)")
    add_floor_arguments(parser)
    run_to_end(Bench("decode", parser, COLUMNS), main)
