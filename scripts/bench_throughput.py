"""Offline work: output tokens per second of mixed batches, time to read many prompts, start and memory.

    python scripts/bench_throughput.py --model-shape llama-8b --json throughput.jsonl [--only W1-64 W3 …]

    W1-K        512 requests, 512 tokens in, 128 out, request i on adapter i mod K (0: the base model), rank 16
    W1-mixed    the same over 16 adapters of rank 8 and 16 of rank 64; also the memory that their pages take
    prefill-K   256 prompts of 1024 tokens with 128 to come: seconds to the last first token
    W3          512 requests, 512 in, 128 out, Zipf (exponent 1) over 256 adapters, 32 a batch; at the start of each run
                all drawn ones lie in host memory and none on the GPU
    W3-cold     the same; at the start of each run none of them has a host copy (files in the page cache)
    start       seconds from the call to ready (no adapters)
    memory      GPU memory in use after the rows above, beyond weights and the page pool

A shortened run before each row does not count. Rows of one engine configuration share one engine: W1, prefill, start and
memory; W3; W3-cold. Adapters that W3 never draws are not loaded: they would only lie on the disk.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from bench_common import (
    WARM_UP_TOKENS,
    Adapters,
    Bench,
    Result,
    gpu_bytes_used,
    greedy,
    make_arguments,
    median_of,
    rounded,
    run_to_end,
)
from bench_model import adapter_bytes, weight_bytes
from bench_stream import time_first_tokens

from manylora import Engine

RANK = 16
REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 512, 512, 128
PREFILL_PROMPTS, PREFILL_TOKENS = 256, 1024
W1_ADAPTERS = (0, 1, 8, 64)
MIXED = {"low": (16, 8), "high": (16, 64)}  # prefix of the names -> how many, rank
PREFILL_ADAPTERS = (0, 64)
W3_ADAPTERS, W3_PER_BATCH = 256, 32
FILLER_RANK = 1
GIB = 1 << 30
COLUMNS = ("tokens_per_s", "seconds", "spread", "pages_gb", "weights_gb", "beyond_gib")
Prepare = Callable[[], object]


class Workload(NamedTuple):
    """Requests of one length; one adapter or None for each."""

    adapters: Adapters
    prompt_tokens: int
    new_tokens: int


def seconds_of(bench: Bench, engine: Engine, work: Workload) -> float:
    """From the call to the last answer, with prompts never seen before."""
    prompts = bench.prompts(len(work.adapters), work.prompt_tokens)
    params = greedy(work.new_tokens)
    started = time.perf_counter()
    engine.generate(input_ids=prompts, sampling_params=params, lora_path=work.adapters)
    return time.perf_counter() - started


def throughput(
    bench: Bench,
    engine: Engine,
    work: Workload,
    *,
    warm_up: Workload | None = None,
    prepare: Prepare = lambda: None,
) -> Result:
    """Output tokens per second. `prepare` runs before each run, untimed; `warm_up` is `work` cut short unless given."""
    short = min(WARM_UP_TOKENS, work.new_tokens)
    seconds_of(bench, engine, (warm_up or work)._replace(new_tokens=short))
    runs: list[float] = []
    for _ in range(bench.args.runs):
        prepare()
        runs.append(seconds_of(bench, engine, work))
    output_tokens = len(work.adapters) * work.new_tokens
    rates = [output_tokens / seconds for seconds in runs]
    return {
        "requests": len(work.adapters),
        "distinct_adapters": len(set(work.adapters) - {None}),
        "prompt_tokens": work.prompt_tokens,
        "new_tokens": work.new_tokens,
        "tokens_per_s": median_of(rates, 1),
        "seconds": median_of(runs),
        "spread": round(max(rates) - min(rates), 1),
        "runs_tokens_per_s": rounded(rates, 1),
    }


def round_robin(names: Sequence[str], count: int) -> list[str | None]:
    return [names[index % len(names)] if names else None for index in range(count)]


def workload(bench: Bench, adapters: Adapters) -> Workload:
    return Workload(adapters, bench.shape.scaled(PROMPT_TOKENS), bench.shape.scaled(NEW_TOKENS))


# ---- W1, prefill, start, memory -----------------------------------------------------------------------------------------


def plain_rows(bench: Bench) -> None:
    """The rows of one engine that holds up to 64 adapters a batch."""
    w1 = {f"W1-{count}": count for count in W1_ADAPTERS if bench.wants(f"W1-{count}")}
    prefill = {f"prefill-{count}": count for count in PREFILL_ADAPTERS if bench.wants(f"prefill-{count}")}
    mixed = bench.wants("W1-mixed")
    if not (w1 or prefill or mixed or bench.wants("start") or bench.wants("memory")):
        return
    started = time.perf_counter()
    flags = {"enable_lora": True, "max_loras_per_batch": max(W1_ADAPTERS), "disable_radix_cache": True}
    with bench.start_engine(**flags) as engine:
        if bench.wants("start"):
            bench.add("start", seconds=round(time.perf_counter() - started, 1))
        names = [f"adapter{index}" for index in range(max([*w1.values(), *prefill.values()], default=0))]
        load_s = bench.load_adapters(engine, names, RANK)
        if names:
            bench.add("loads", adapters=len(names), rank=RANK, seconds=round(load_s, 2))
        requests = bench.shape.scaled(REQUESTS)
        for row, count in w1.items():
            work = workload(bench, round_robin(names[:count], requests))
            bench.measure(row, lambda work=work: throughput(bench, engine, work))
        for row, count in prefill.items():
            bench.measure(row, lambda used=names[:count]: time_to_prefill(bench, engine, used))
        if mixed:
            bench.measure("W1-mixed", lambda: mixed_ranks(bench, engine))
        if bench.wants("memory") and gpu_bytes_used() is not None:
            bench.measure("memory", lambda: memory(bench, engine))


def time_to_prefill(bench: Bench, engine: Engine, names: Sequence[str]) -> Result:
    adapters = round_robin(names, bench.shape.scaled(PREFILL_PROMPTS))
    length, new_tokens = bench.shape.scaled(PREFILL_TOKENS), bench.shape.scaled(NEW_TOKENS)
    runs: list[float] = []
    for _ in range(1 + bench.args.runs):
        prompts = bench.prompts(len(adapters), length)
        runs.append(time_first_tokens(engine, prompts, adapters, new_tokens))
    del runs[0]
    return {
        "requests": len(adapters),
        "distinct_adapters": len(names),
        "prompt_tokens": length,
        "seconds": median_of(runs),
        "spread": round(max(runs) - min(runs), 3),
        "runs_s": rounded(runs),
    }


def mixed_ranks(bench: Bench, engine: Engine) -> Result:
    """W1 over adapters of two ranks, dealt alternately; how many bytes of pages hold them."""
    names: list[str] = []
    held = 0
    for prefix, (count, rank) in MIXED.items():
        bench.load_adapters(engine, [f"{prefix}{index}" for index in range(count)], rank)
        held += count * adapter_bytes(bench.model, rank)
    for index in range(max(count for count, _ in MIXED.values())):
        names += [f"{prefix}{index}" for prefix, (count, _) in MIXED.items() if index < count]
    result = throughput(bench, engine, workload(bench, round_robin(names, bench.shape.scaled(REQUESTS))))
    pages = sum(adapter.num_pages for adapter in engine.state().adapters if adapter.lora_name in names)
    return result | {
        "pages_gb": round(pages * engine_page_bytes(engine) / 1e9, 3),
        "weights_gb": round(held / 1e9, 3),
    }


def memory(bench: Bench, engine: Engine) -> Result:
    """What the GPU holds beside the weights and the pool: graphs, workspaces, CUDA itself."""
    used = gpu_bytes_used()
    assert used is not None
    pool = engine.state().pages_total * engine_page_bytes(engine)
    embedding = 2 * bench.model.vocab_size * bench.model.hidden_size
    weights = weight_bytes(bench.model) + embedding
    return {
        "used_gib": round(used / GIB, 2),
        "pool_gib": round(pool / GIB, 2),
        "model_gib": round(weights / GIB, 2),
        "beyond_gib": round((used - pool - weights) / GIB, 2),
    }


def engine_page_bytes(engine: Engine) -> int:
    return engine.get_server_info()["page_bytes"]


# ---- W3 ---------------------------------------------------------------------------------------------------------------


def zipf_rows(bench: Bench, row: str, *, cold: bool) -> None:
    """The Zipf workload on an engine of its own; `cold` bounds the host copies so that every first use reads the file."""
    if not bench.wants(row):
        return
    per_batch = min(W3_PER_BATCH, bench.shape.scaled(W3_ADAPTERS))
    flags = {"enable_lora": True, "max_loras_per_batch": per_batch, "disable_radix_cache": True}
    if cold:
        flags["max_loaded_loras"] = per_batch
    with bench.start_engine(**flags) as engine:
        bench.measure(row, lambda: zipf(bench, engine, per_batch, cold=cold))


def zipf(bench: Bench, engine: Engine, per_batch: int, *, cold: bool) -> Result:
    adapters = zipf_adapters(bench.shape.scaled(W3_ADAPTERS), bench.shape.scaled(REQUESTS))
    drawn = sorted({name for name in adapters if name is not None})
    fillers = [f"filler{index}" for index in range(per_batch)]
    loads: list[float] = []

    def forget_copies() -> None:
        """New versions of all that are drawn; where host copies are few, the fillers' then take their places."""
        loads.append(bench.load_adapters(engine, drawn, RANK))
        if cold:
            bench.load_adapters(engine, fillers, FILLER_RANK)
        check_tiers(engine, set(drawn), "disk" if cold else "host")

    bench.load_adapters(engine, fillers, FILLER_RANK)
    work = workload(bench, adapters)
    warm_up = work._replace(adapters=round_robin(fillers, len(adapters)))
    result = throughput(bench, engine, work, warm_up=warm_up, prepare=forget_copies)
    return result | {"loads_s": median_of(loads, 2)}


def check_tiers(engine: Engine, names: set[str], tier: str) -> None:
    """Raise RuntimeError unless all of `names` are where a run is to find them."""
    wrong = [
        f"{adapter.lora_name} ({adapter.tier})"
        for adapter in engine.state().adapters
        if adapter.lora_name in names and adapter.tier != tier
    ]
    if wrong:
        raise RuntimeError(f"not in tier {tier} at the start of a run: {', '.join(wrong)}")


def zipf_adapters(num_adapters: int, count: int) -> list[str | None]:
    """`count` draws, the i-th adapter with a weight of 1/i; the same in every run."""
    weights = [1 / (1 + index) for index in range(num_adapters)]
    drawn = random.Random(0).choices(range(num_adapters), weights, k=count)
    return [f"zipf{index}" for index in drawn]


def main(bench: Bench) -> None:
    bench.attempt("W1, prefill", lambda: plain_rows(bench))
    bench.attempt("W3", lambda: zipf_rows(bench, "W3", cold=False))
    bench.attempt("W3-cold", lambda: zipf_rows(bench, "W3-cold", cold=True))


if __name__ == "__main__":
    run_to_end(Bench("throughput", make_arguments(__doc__), COLUMNS), main)
