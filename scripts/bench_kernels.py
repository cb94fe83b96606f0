"""Times the attention and pointwise kernels with the sizes of Llama-3.1-8B, one JSON line per result.

    python scripts/bench_kernels.py [--ops decode prefill …] [--sweep] [--json results.jsonl]

Each op is captured in a CUDA graph of several calls on different memory, so that neither launches nor the L2 cache are
measured. `us` is the time of one call, median of the replays; `gbps` counts the bytes that must move, `tflops` the
products that causality leaves. --sweep times attention and products with many launch configurations instead of the default one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime.errors import OutOfResources

from manylora.kernels import linear_triton, paged_decode_triton, paged_prefill_triton
from manylora.kernels.activation import silu_and_mul
from manylora.kernels.rms_norm import fused_add_rms_norm, rms_norm
from manylora.kernels.rope_and_store import rope_and_store

HEADS, KV_HEADS, HEAD_DIM, HIDDEN, INTER, LAYERS = 32, 8, 128, 4096, 14336, 32
PAGE_SIZE = 16
SCALE = HEAD_DIM**-0.5
ITEM = 2  # bytes of bfloat16
TOKEN_KV = 2 * KV_HEADS * HEAD_DIM * ITEM  # bytes of one layer
POOL_BYTES = 40 << 30
ROTATED_BYTES = 512 << 20  # several times the L2 cache
MAX_CALLS = 64
REPLAYS = 20
DECODE_SHAPES = [(batch, length) for length in (1024, 8192) for batch in (1, 8, 32, 64, 128, 256)]
PREFILL_SHAPES = [(1, 8192), (8, 1024), (32, 256)]
POINTWISE_TOKENS = (1, 64, 256, 8192)
LINEAR_TOKENS = (1, 8, 16, 32, 48, 64, 128, 256)
PROJECTIONS = {
    "qkv": (HIDDEN, 6144),
    "o": (HIDDEN, HIDDEN),
    "gate_up": (HIDDEN, 2 * INTER),
    "down": (INTER, HIDDEN),
    "lm_head": (HIDDEN, 128256),
}
LINEAR_LAUNCHES = [
    linear_triton.Launch(64, 128, 4, 7, swapped=True),
    linear_triton.Launch(64, 128, 4, 5, swapped=True),
    linear_triton.Launch(128, 128, 8, 4, swapped=True),
    linear_triton.Launch(32, 256, 4, 4, swapped=False),
]
PREFILL_LAUNCHES = [
    paged_prefill_triton.Launch(block_m, block_n, num_warps, num_stages)
    for block_m, block_n, num_warps in ((128, 64, 8), (128, 128, 8), (128, 32, 8), (64, 64, 4), (64, 32, 4))
    for num_stages in (2, 3, 4)
]

Call = Callable[[], object]


@dataclass(frozen=True, slots=True)
class Case:
    """One line of the results. calls: the same work on different memory."""

    op: str
    shape: dict[str, Any]
    calls: list[Call]
    num_bytes: int = 0
    flops: int = 0


class Cache:
    """The KV of `batch` sequences of `length` tokens for as many layers as fit, in pages dealt out at random."""

    def __init__(self, batch: int, length: int, layer_major: bool = False) -> None:
        row_pages = -(-length // PAGE_SIZE)
        num_pages = batch * row_pages
        layers = max(2, min(LAYERS, POOL_BYTES // (num_pages * PAGE_SIZE * TOKEN_KV)))
        page = (2, KV_HEADS, PAGE_SIZE, HEAD_DIM)
        if layer_major:
            self._layers = random(layers, num_pages, *page).unbind(0)
        else:
            self._layers = random(num_pages, layers, *page).unbind(1)
        self.page_table = torch.randperm(num_pages, device="cuda").view(batch, row_pages)

    def rotated(self, bytes_per_call: int) -> list[Tensor]:
        """A layer for each call."""
        count = num_calls(bytes_per_call)
        return [self._layers[i % len(self._layers)] for i in range(count)]


def decode_cases(
    batch: int,
    length: int,
    launches: Sequence[paged_decode_triton.Launch | None] = (None,),
    layer_major: bool = False,
) -> Iterator[Case]:
    cache = Cache(batch, length, layer_major)
    q, out = random(batch, HEADS, HEAD_DIM), random(batch, HEADS, HEAD_DIM)
    slots = torch.arange(batch, device="cuda")
    lens = torch.full((batch,), length, device="cuda")
    num_bytes = batch * length * TOKEN_KV + 2 * q.nbytes
    layers = cache.rotated(num_bytes)

    def call(layer: Tensor, launch: paged_decode_triton.Launch | None) -> Call:
        return lambda: paged_decode_triton.paged_decode_attention(
            q, layer, cache.page_table, slots, lens, SCALE, out, launch
        )

    for launch in launches:
        shape: dict[str, Any] = {"batch": batch, "length": length, "launch": launch}
        shape["strides"] = "layer-major" if layer_major else "page-major"
        yield Case("decode", shape, [call(layer, launch) for layer in layers], num_bytes=num_bytes)


def prefill_cases(
    batch: int, length: int, launches: Sequence[paged_prefill_triton.Launch | None] = (None,)
) -> Iterator[Case]:
    cache = Cache(batch, length)
    num_tokens = batch * length
    q, out = random(num_tokens, HEADS, HEAD_DIM), random(num_tokens, HEADS, HEAD_DIM)
    rows = torch.tensor([(row, 0, length, row * length) for row in range(batch)], device="cuda")
    layers = cache.rotated(num_tokens * TOKEN_KV)

    def call(layer: Tensor, launch: paged_prefill_triton.Launch | None) -> Call:
        return lambda: paged_prefill_triton.paged_prefill_attention(
            q, layer, cache.page_table, rows, SCALE, out, launch
        )

    flops = 4 * HEADS * HEAD_DIM * batch * length * (length + 1) // 2
    for launch in launches:
        shape: dict[str, Any] = {"batch": batch, "length": length, "launch": launch}
        yield Case("prefill", shape, [call(layer, launch) for layer in layers], flops=flops)


def norm_cases(num_tokens: int) -> Iterator[Case]:
    weight, size = random(HIDDEN), num_tokens * HIDDEN * ITEM
    inputs = [random(2, num_tokens, HIDDEN) for _ in range(num_calls(2 * size))]
    shape = {"tokens": num_tokens}
    calls: list[Call] = [lambda x=x: rms_norm(x[0], weight, 1e-5) for x in inputs]
    yield Case("rms_norm", shape, calls, num_bytes=2 * size)
    calls = [lambda x=x: fused_add_rms_norm(x[0], x[1], weight, 1e-5) for x in inputs]
    yield Case("fused_add_rms_norm", shape, calls, num_bytes=4 * size)


def gate_cases(num_tokens: int) -> Iterator[Case]:
    size = num_tokens * INTER * ITEM
    inputs = [random(num_tokens, 2 * INTER) for _ in range(num_calls(2 * size))]
    calls: list[Call] = [lambda x=x: silu_and_mul(x) for x in inputs]
    yield Case("silu_and_mul", {"tokens": num_tokens}, calls, num_bytes=3 * size)


def linear_cases(num_tokens: int, sweep: bool) -> Iterator[Case]:
    """Of every projection: the library's product and, of few rows, ours."""
    for name, (features, outputs) in PROJECTIONS.items():
        size = outputs * features * ITEM
        x = random(num_tokens, features)
        weights = [random(outputs, features) for _ in range(max(4, ROTATED_BYTES // size))]
        shape: dict[str, Any] = {"tokens": num_tokens, "projection": name}
        work = {"num_bytes": size, "flops": 2 * num_tokens * outputs * features}
        calls: list[Call] = [partial(linear, x, weight) for weight in weights]
        yield Case("linear", shape | {"launch": "library"}, calls, **work)
        for launch in LINEAR_LAUNCHES if sweep else (None,):
            if num_tokens <= linear_triton.MAX_ROWS:
                calls = [partial(linear_triton.linear, x, weight, launch=launch) for weight in weights]
                yield Case("linear", shape | {"launch": launch}, calls, **work)


def rope_cases(num_tokens: int) -> Iterator[Case]:
    cache = Cache(1, max(num_tokens, 8192))
    cos_sin = torch.rand(8192, HEAD_DIM, device="cuda")
    positions = torch.randint(8192, (num_tokens,), device="cuda")
    kv_slots = torch.randperm(cache.page_table.numel() * PAGE_SIZE, device="cuda")[:num_tokens]
    size = num_tokens * (HEADS + 2 * KV_HEADS) * HEAD_DIM * ITEM
    layers = cache.rotated(size)
    inputs = [random(num_tokens, HEADS + 2 * KV_HEADS, HEAD_DIM) for _ in layers]

    def call(qkv: Tensor, layer: Tensor) -> Call:
        q, k, v = qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1)
        return lambda: rope_and_store(q, k, v, cos_sin, positions, layer, kv_slots)

    calls = [call(qkv, layer) for qkv, layer in zip(inputs, layers, strict=True)]
    yield Case("rope_and_store", {"tokens": num_tokens}, calls, num_bytes=2 * size)


def cases(ops: list[str], sweep: bool) -> Iterator[Case]:
    """What to time, made one after another: each holds gigabytes."""
    if "decode" in ops:
        for batch, length in DECODE_SHAPES:
            yield from decode_cases(batch, length, decode_launches() if sweep else (None,))
        for layer_major in (False, True):
            yield from decode_cases(256, 1090, layer_major=layer_major)
    if "prefill" in ops:
        for batch, length in PREFILL_SHAPES:
            yield from prefill_cases(batch, length, PREFILL_LAUNCHES if sweep else (None,))
    if "linear" in ops:
        for num_tokens in LINEAR_TOKENS:
            yield from linear_cases(num_tokens, sweep)
    for op, make in (("norm", norm_cases), ("gate", gate_cases), ("rope", rope_cases)):
        if op in ops:
            for num_tokens in POINTWISE_TOKENS:
                yield from make(num_tokens)


def decode_launches() -> list[paged_decode_triton.Launch]:
    sms = torch.cuda.get_device_properties(0).multi_processor_count
    cuts = [
        (64, 4, 3),
        (64, 4, 4),
        (64, 4, 5),
        (64, 8, 4),
        (32, 4, 4),
        (32, 4, 6),
        (32, 2, 4),
        (128, 4, 2),
        (128, 8, 3),
    ]
    return [
        paged_decode_triton.Launch(per_sm * sms, block_n, num_warps, num_stages)
        for block_n, num_warps, num_stages in cuts
        for per_sm in (1, 2, 3, 4, 6)
    ]


def microseconds(calls: list[Call]) -> float:
    """Of one call: the median of the replays of a graph of them all."""
    calls[0]()  # compiles, and makes what is made once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times: list[float] = []
    for _ in range(REPLAYS + 3):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[3:]) * 1e3 / len(calls)


def measured(case: Case) -> dict[str, Any]:
    """The case's line, without what is the same for all."""
    line: dict[str, Any] = {"op": case.op, **case.shape}
    try:
        us = microseconds(case.calls)
    except OutOfResources as error:
        return line | {"error": str(error)}
    line["us"] = round(us, 2)
    if case.num_bytes:
        line["gbps"] = round(case.num_bytes / us / 1e3, 1)
    if case.flops:
        line["tflops"] = round(case.flops / us / 1e6, 1)
    return line


def num_calls(bytes_per_call: int) -> int:
    return max(4, min(MAX_CALLS, ROTATED_BYTES // max(1, bytes_per_call)))


def random(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="cuda").normal_()


def main() -> None:
    ops = ["decode", "prefill", "linear", "norm", "gate", "rope"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=ops, default=ops)
    parser.add_argument(
        "--sweep", action="store_true", help="many launch configurations of attention and products"
    )
    parser.add_argument("--json", type=argparse.FileType("w"), help="also write the lines to this file")
    args = parser.parse_args()
    file: TextIO | None = args.json
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    common = {"commit": commit, "gpu": torch.cuda.get_device_name()}
    for case in cases(args.ops, args.sweep):
        text = json.dumps(measured(case) | common)
        print(text, flush=True)
        if file:
            print(text, file=file, flush=True)


if __name__ == "__main__":
    main()
