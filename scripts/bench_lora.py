"""Times the LoRA kernels with the sizes of Llama-3.1-8B, one JSON line per result.

    python scripts/bench_lora.py [--ops shrink expand delta] [--sites qkv …] [--prefill] [--sweep] [--json results.jsonl]

`tokens` in equal runs over `adapters`, all of one rank or, "mixed", of ranks 8 and 64 in turn. Each op is captured in a
CUDA graph that goes through many layers' weights, so that neither launches nor the L2 cache are measured. `us` is the
time of one site of one layer; `gbps` counts the weights of every adapter once and the activations once.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TextIO

import torch
from bench_kernels import Call, Case, measured, random

from manylora.kernels.lora_expand_triton import lora_expand
from manylora.kernels.lora_shrink_triton import lora_shrink
from manylora.kernels.lora_work import Launch, LoRAWork
from manylora.kernels.lora_work_triton import list_work

SITES: dict[str, tuple[int, tuple[int, ...]]] = {
    "qkv": (4096, (4096, 1024, 1024)),
    "o": (4096, (4096,)),
    "gate_up": (4096, (14336, 14336)),
    "down": (14336, (4096,)),
}
DECODE_TOKENS, PREFILL_TOKENS, ADAPTERS = (1, 8, 32, 64, 256), 8192, (1, 8, 64)
ITEM = 2  # bytes of bfloat16
WEIGHT_BYTES = 300 << 20  # of the layers that are gone through: several times the L2 cache
ALIGN = 32
OPS = ("shrink", "expand", "delta")
LAUNCHES = [
    Launch(*launch)
    for launch in itertools.product((1, 2, 3, 4, 6, 8), (64, 128, 256), (2, 4, 8), (2, 3, 4, 5))
]


class Weights:
    """One site's pieces of all adapters in many layers, and the table that finds them."""

    def __init__(self, features: int, out_sizes: tuple[int, ...], ranks: list[int]) -> None:
        widths = [min(16, rank - first) for rank in ranks for first in range(0, rank, 16)]
        self.num_slices = [-(-rank // 16) for rank in ranks]
        self.layer_bytes = ITEM * sum(width * (features + size) for width in widths for size in out_sizes)
        self.layers = max(4, min(64, WEIGHT_BYTES // self.layer_bytes))
        shape = (len(widths), self.layers, len(out_sizes))
        self.a_offsets = torch.empty(shape, dtype=torch.int64)
        self.b_offsets = torch.empty_like(self.a_offsets)
        used = 0
        for layer, (row, width) in itertools.product(range(self.layers), enumerate(widths)):
            for offsets, sizes in (
                (self.a_offsets, [features] * len(out_sizes)),
                (self.b_offsets, out_sizes),
            ):
                for module, size in enumerate(sizes):
                    offsets[row, layer, module] = used
                    used += -(-width * size // ALIGN) * ALIGN
        self.pages = random(used)
        self.a_offsets, self.b_offsets = self.a_offsets.cuda(), self.b_offsets.cuda()
        self.widths = torch.tensor(widths, dtype=torch.int32).view(-1, 1, 1).expand(shape).contiguous().cuda()
        self.scalings = torch.ones(shape, device="cuda")


def equal_runs(num_tokens: int, weights: Weights) -> LoRAWork:
    """A step whose tokens are dealt out to the adapters."""
    count = len(weights.num_slices)
    bounds = [num_tokens * i // count for i in range(count + 1)]
    entries = [0, *itertools.accumulate(weights.num_slices)]
    segments = torch.tensor(list(zip(bounds, bounds[1:], entries, weights.num_slices, strict=False)))
    most = max(weights.num_slices)
    work = LoRAWork(segments.cuda(), torch.arange(entries[-1], device="cuda"), most, num_tokens, 48)
    list_work(work)
    return work


def cases(
    site: str,
    num_tokens: int,
    num_adapters: int,
    rank: int | None,
    ops: list[str],
    launches: list[Launch | None],
) -> Iterator[Case]:
    """`rank` of all adapters, or None: 8 and 64 in turn."""
    features, out_sizes = SITES[site]
    weights = Weights(features, out_sizes, [rank or (8, 64)[i % 2] for i in range(num_adapters)])
    work = equal_runs(num_tokens, weights)
    x, y = random(num_tokens, features), random(num_tokens, sum(out_sizes))
    planes = work.planes(features, 16 * len(out_sizes)).zero_()

    def shrink(layer: int, launch: Launch | None) -> None:
        offsets, widths = weights.a_offsets[:, layer], weights.widths[:, layer]
        lora_shrink(x, weights.pages, offsets, widths, work, planes, 1, launch)

    def expand(layer: int, launch: Launch | None) -> None:
        table = (weights.b_offsets[:, layer], weights.widths[:, layer], weights.scalings[:, layer])
        lora_expand(planes[None], weights.pages, *table, work, y, out_sizes, launch)

    def delta(layer: int, launch: Launch | None) -> None:
        shrink(layer, launch)
        expand(layer, launch)

    a_share = len(out_sizes) * features / (len(out_sizes) * features + sum(out_sizes))
    a_bytes, b_bytes = int(weights.layer_bytes * a_share), int(weights.layer_bytes * (1 - a_share))
    known: dict[str, tuple[Callable[[int, Launch | None], None], int]] = {
        "shrink": (shrink, a_bytes + x.nbytes),
        "expand": (expand, b_bytes + 2 * y.nbytes),
        "delta": (delta, weights.layer_bytes + x.nbytes + 2 * y.nbytes),
    }
    shape: dict[str, Any] = {
        "site": site,
        "tokens": num_tokens,
        "adapters": num_adapters,
        "rank": rank or "mixed",
    }
    for op, launch in itertools.product(ops, launches):
        function, num_bytes = known[op]
        calls: list[Call] = [partial(function, layer, launch) for layer in range(weights.layers)]
        yield Case(op, shape | ({"launch": launch} if launch else {}), calls, num_bytes=num_bytes)


def steps(prefill: bool) -> Iterator[tuple[int, int]]:
    """(tokens, adapters)."""
    for num_tokens in (PREFILL_TOKENS,) if prefill else DECODE_TOKENS:
        for num_adapters in ADAPTERS:
            if num_adapters <= num_tokens:
                yield num_tokens, num_adapters


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES))
    parser.add_argument("--tokens", nargs="+", type=int, help="only these numbers of tokens")
    parser.add_argument(
        "--prefill", action="store_true", help=f"{PREFILL_TOKENS} tokens instead of decode steps"
    )
    parser.add_argument("--sweep", action="store_true", help="many launch configurations")
    parser.add_argument("--json", type=argparse.FileType("w"), help="also write the lines to this file")
    args = parser.parse_args()
    file: TextIO | None = args.json
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    common = {"commit": commit, "gpu": torch.cuda.get_device_name()}
    launches: list[Launch | None] = [*LAUNCHES] if args.sweep else [None]
    for site, (num_tokens, num_adapters), rank in itertools.product(
        args.sites, steps(args.prefill), (16, None)
    ):
        if args.tokens and num_tokens not in args.tokens:
            continue
        for case in cases(site, num_tokens, num_adapters, rank, args.ops, launches):
            text = json.dumps(measured(case) | common)
            print(text, flush=True)
            if file:
                print(text, file=file, flush=True)


if __name__ == "__main__":
    main()
