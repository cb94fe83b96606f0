"""Times the LoRA kernels with the sizes of Llama-3.1-8B, one JSON line per result.

    python scripts/bench_lora.py [--ops shrink expand delta] [--sites qkv …] [--tokens 1 64 …] [--prefill] [--sweep]
        [--json results.jsonl]

`tokens` in equal runs over `adapters`, all of one rank or, "mixed", of ranks 8 and 64 in turn. Each op is captured in a
CUDA graph that goes through many layers' weights, so that neither launches nor the L2 cache are measured. `us` is the
time of one site of one layer; `gbps` counts the weights of every adapter once and the activations once. --sweep times
`launches` of shrink and expand with as many adapters as there can be, all of rank 16; most of that is compiling.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
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
SWEPT_OPS = ("shrink", "expand")
EXPAND_LAUNCHES = [
    Launch(4, 256, 4, 4),
    Launch(4, 256, 4, 3),
    Launch(5, 256, 4, 4),
    Launch(3, 256, 4, 5),
    Launch(4, 128, 2, 4),
    Launch(8, 128, 2, 3),
    Launch(3, 512, 4, 3),
    Launch(2, 512, 8, 4),
    Launch(3, 512, 8, 3),
]
PREFILL_LAUNCHES = [Launch(*launch) for launch in itertools.product((1, 2, 3), (128,), (4, 8), (3, 4))]


def launches(op: str, columns: int, decode: bool) -> list[Launch]:
    """What --sweep tries for planes of so many columns."""
    if not decode:
        return PREFILL_LAUNCHES
    if op == "expand":
        return EXPAND_LAUNCHES
    rows = 1 << (columns - 1).bit_length()
    block, warps = 4096 // rows, rows // 16
    return [
        Launch(4, block, warps, 4),
        Launch(6, block, warps, 4),
        Launch(8, block, warps, 3),
        Launch(4, block, 2 * warps, 4),
        Launch(3, 2 * block, warps, 4),
        Launch(4, 2 * block, warps, 3),
        Launch(8, block // 2, warps, 5),
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
    sweep: bool,
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
    for op in ops:
        function, num_bytes = known[op]
        for launch in launches(op, 16 * len(out_sizes), work.decode) if sweep else [None]:
            calls: list[Call] = [partial(function, layer, launch) for layer in range(weights.layers)]
            yield Case(op, shape | ({"launch": launch} if launch else {}), calls, num_bytes=num_bytes)


def steps(tokens: Sequence[int], sweep: bool) -> Iterator[tuple[int, int, int | None]]:
    """(tokens, adapters, rank as `cases` takes it)."""
    for num_tokens in tokens:
        fitting = [num_adapters for num_adapters in ADAPTERS if num_adapters <= num_tokens]
        for num_adapters in fitting[-1:] if sweep else fitting:
            for rank in (16,) if sweep else (16, None):
                yield num_tokens, num_adapters, rank


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ops", nargs="+", choices=OPS)
    parser.add_argument("--sites", nargs="+", choices=SITES, default=list(SITES))
    parser.add_argument("--tokens", nargs="+", type=int, help="of a step", default=DECODE_TOKENS)
    parser.add_argument(
        "--prefill", action="store_true", help=f"{PREFILL_TOKENS} tokens instead of decode steps"
    )
    parser.add_argument("--sweep", action="store_true", help="several launches of shrink and expand")
    parser.add_argument("--json", type=argparse.FileType("w"), help="also write the lines to this file")
    args = parser.parse_args()
    file: TextIO | None = args.json
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    common = {"commit": commit, "gpu": torch.cuda.get_device_name()}
    ops: list[str] = args.ops or list(SWEPT_OPS if args.sweep else OPS)
    tokens = (PREFILL_TOKENS,) if args.prefill else args.tokens
    for site, (num_tokens, num_adapters, rank) in itertools.product(args.sites, steps(tokens, args.sweep)):
        for case in cases(site, num_tokens, num_adapters, rank, ops, args.sweep):
            text = json.dumps(measured(case) | common)
            print(text, flush=True)
            if file:
                print(text, file=file, flush=True)


if __name__ == "__main__":
    main()
