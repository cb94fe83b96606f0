"""Whether adapters that are loaded disturb those that answer: step times with and without loads beside them.

    python scripts/bench_churn.py --model-shape llama-8b --json churn.jsonl

64 rows with an adapter of their own decode 1000 tokens each; the gaps between the tokens of one of them, streamed, are
the step times. Row `quiet` is that alone. In row `churn` rank-16 adapters are loaded one after another meanwhile, each
pinned under a name that the one before had: read, checked, staged on the host, copied into GPU memory at once, and the
one before freed. `ratio` is a row's 99th percentile over the median of `quiet`.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from bench_common import (
    WARM_UP_TOKENS,
    Bench,
    Result,
    greedy,
    make_arguments,
    median_of,
    percentile,
    run_to_end,
)

from manylora import Engine

RANK = 16
BATCH, PROMPT_TOKENS, STEPS = 64, 256, 1000
SETTLING_STEPS = 20  # while the last prompts are read
COLUMNS = ("steps", "p50_ms", "p99_ms", "max_ms", "ratio", "loads")


def step_times(bench: Bench, engine: Engine, num_steps: int) -> list[float]:
    """Milliseconds of each step while all rows decode."""
    prompts = bench.prompts(BATCH, bench.shape.scaled(PROMPT_TOKENS))
    adapters = [name_of(row) for row in range(BATCH)]
    params = greedy(num_steps + 2 * SETTLING_STEPS)
    gaps: list[float] = []
    last, num_tokens = 0.0, 0
    with ThreadPoolExecutor(1) as threads:
        others = threads.submit(
            engine.generate, input_ids=prompts[1:], sampling_params=params, lora_path=adapters[1:]
        )
        for event in engine.generate(
            input_ids=prompts[0], sampling_params=params, lora_path=adapters[0], stream=True
        ):
            now, before = time.perf_counter(), num_tokens
            num_tokens = event["meta_info"]["completion_tokens"]
            if before >= SETTLING_STEPS:
                gaps += [1e3 * (now - last) / (num_tokens - before)] * (num_tokens - before)
            last = now
        others.result()
    return gaps[:num_steps]


@contextlib.contextmanager
def loading(bench: Bench, engine: Engine) -> Iterator[list[float]]:
    """Load one adapter after another until the block ends; the list gets the seconds of each."""
    seconds: list[float] = []
    done = threading.Event()

    def load() -> None:
        while not done.is_set():
            started = time.perf_counter()
            engine.load_lora_adapter("newcomer", bench.adapter_dir(RANK), pinned=True, replace=True)
            seconds.append(time.perf_counter() - started)

    with ThreadPoolExecutor(1) as threads:
        loads = threads.submit(load)
        try:
            yield seconds
        finally:
            done.set()
        loads.result()


def measure(bench: Bench) -> None:
    """Both rows, on one engine."""
    steps = bench.shape.scaled(STEPS)
    flags = {"enable_lora": True, "max_loras_per_batch": BATCH + 1, "disable_radix_cache": True}
    with bench.start_engine(**flags) as engine:
        bench.load_adapters(engine, map(name_of, range(BATCH)), RANK)
        step_times(bench, engine, WARM_UP_TOKENS)
        quiet = step_times(bench, engine, steps)
        usual = median_of(quiet)
        bench.add("quiet", **summary(quiet, usual))
        with loading(bench, engine) as seconds:
            times = step_times(bench, engine, steps)
        bench.add("churn", **summary(times, usual), loads=len(seconds), load_s=median_of(seconds))


def main(bench: Bench) -> None:
    bench.attempt("failed", lambda: measure(bench))


def summary(times: list[float], usual: float) -> Result:
    high = percentile(times, 99)
    return {
        "batch": BATCH,
        "rank": RANK,
        "steps": len(times),
        "p50_ms": median_of(times),
        "p99_ms": round(high, 3),
        "max_ms": round(max(times), 3),
        "ratio": round(high / usual, 3),
    }


def name_of(index: int) -> str:
    return f"adapter{index}"


if __name__ == "__main__":
    run_to_end(Bench("churn", make_arguments(__doc__), COLUMNS), main)
