"""What the benchmarks share: flags, the engine they drive, one JSON line per result, and the table at the end.

    python scripts/bench_<name>.py --model-shape llama-8b --json results.jsonl [--only ROW …] [flags of manylora serve]

They go through `manylora.Engine` with token ids, greedy and past every eos. Text costs next to nothing: the tokenizer
knows only 256 ids, and an answer that is not streamed is decoded once, at its end.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench_model import SHAPES, write_adapter, write_model

from manylora import Engine
from manylora.runtime.errors import ConfigError
from manylora.runtime.flags import FLAGS, make_parser, parse_flags
from manylora.runtime.model_config import load_model_config

ROOT = Path(__file__).resolve().parent.parent
CONTEXT_LENGTH = 8192
WARM_UP_TOKENS = 8  # of the run that does not count
_LOADS_AT_ONCE = 8

Result = dict[str, Any]
Adapters = Sequence[str | None]


def make_arguments(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the flags every benchmark has."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model-shape", choices=list(SHAPES), required=True)
    parser.add_argument("--json", type=Path, help="append the result lines to this file")
    parser.add_argument("--only", nargs="+", metavar="ROW", help="measure these rows")
    parser.add_argument("--runs", type=int, default=3, help="runs of a row that count (default: 3)")
    parser.add_argument("--commit", default=None, help="what the lines say was measured; default: git's HEAD")
    return parser


def typed_flags(argv: Sequence[str]) -> dict[str, Any]:
    """Flags of `manylora serve` as keyword arguments of Engine."""
    given = vars(make_parser("flags for the server").parse_args(argv))
    config = parse_flags(["--model-path", "any", *argv])
    flags = {flag.name: flag for flag in FLAGS}
    sections = {name: flags[name].section for name in given}
    return {
        name: getattr(getattr(config, section) if section else config, flags[name].target.name)
        for name, section in sections.items()
    }


class Bench:
    """One program's run: its model on disk, its results so far. Use it in a `with` block, which ends with the table."""

    def __init__(self, name: str, parser: argparse.ArgumentParser, columns: Sequence[str]) -> None:
        """Parse the command line; what the parser does not know are flags for the server."""
        self.args, rest = parser.parse_known_args()
        self.server_argv = rest
        try:
            self.server_flags = typed_flags(rest)
        except ConfigError as error:
            parser.error(str(error))
        self.shape = SHAPES[self.args.model_shape]
        self.failed = False
        self._columns = ("row", *columns)
        self._common = {
            "bench": name,
            "shape": self.args.model_shape,
            "commit": self.args.commit or _commit(),
            "gpu": gpu_names(),
            "flags": self.server_flags,
        }
        self._results: list[Result] = []
        self._files = tempfile.TemporaryDirectory(prefix="manylora-bench-")
        self.model_dir = Path(self._files.name) / "model"
        write_model(self.model_dir, self.shape)
        self.model = load_model_config(self.model_dir)
        self._random = random.Random(0)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.cleanup()
        self._print_table()

    # ---- what is served -------------------------------------------------------------------------------------------

    def start_engine(self, **flags: Any) -> Engine:
        """An engine on random weights; the command line's flags come before `flags`."""
        defaults: dict[str, Any] = {"context_length": CONTEXT_LENGTH, "log_level": "warning"}
        merged = defaults | flags | self.server_flags
        engine = Engine(str(self.model_dir), load_format="dummy", **merged)
        # As a server's front does. A collection of all that is imported here takes 100 ms, and in the last steps of a
        # window these would count as the steps' (bench_stream.py).
        gc.collect()
        gc.freeze()
        return engine

    def adapter_dir(self, rank: int) -> str:
        """The directory of the adapter of `rank`, written when first asked for."""
        directory = self.model_dir.parent / f"rank{rank}"
        if not directory.exists():
            write_adapter(directory, self.model, rank)
        return str(directory)

    def load_adapters(self, engine: Engine, names: Iterable[str], rank: int) -> float:
        """Load each name, or load it anew: the same files, but to the server each is a version of its own. Seconds."""
        path = self.adapter_dir(rank)
        started = time.perf_counter()
        with ThreadPoolExecutor(_LOADS_AT_ONCE) as threads:
            list(threads.map(lambda name: engine.load_lora_adapter(name, path, replace=True), names))
        return time.perf_counter() - started

    def prompts(self, count: int, length: int) -> list[list[int]]:
        """Random token ids, others in every call."""
        return [self._random.choices(range(self.model.vocab_size), k=length) for _ in range(count)]

    def arrivals(self, count: int, rate: float) -> list[float]:
        """Moments in seconds with exponential gaps, `rate` a second on average."""
        return list(itertools.accumulate(self._random.expovariate(rate) for _ in range(count)))

    # ---- results --------------------------------------------------------------------------------------------------

    def wants(self, row: str) -> bool:
        return not self.args.only or row in self.args.only

    def measure(self, row: str, result: Callable[[], Result]) -> None:
        """Add a row. One that fails says why, and the next has its turn."""
        self.attempt(row, lambda: self.add(row, **result()))

    def attempt(self, row: str, work: Callable[[], None]) -> None:
        """Do what adds its rows itself; should it fail, `row` says why."""
        try:
            work()
        except Exception as error:
            self.fail(row, error)

    def fail(self, row: str, error: Exception) -> None:
        self.failed = True
        traceback.print_exception(error)
        self.add(row, error=f"{type(error).__name__}: {error}")

    def add(self, row: str, **values: Any) -> None:
        self._results.append({"row": row, **values})
        line = json.dumps({**self._common, "row": row, **values}, default=str)
        print(line, flush=True)
        if self.args.json:
            with self.args.json.open("a") as file:
                file.write(line + "\n")

    def _print_table(self) -> None:
        cells = [list(self._columns)]
        for result in self._results:
            shown = [_shown(result.get(column)) for column in self._columns]
            cells.append([*shown, result.get("error", "")])
        widths = [max(len(row[index]) for row in cells) for index in range(len(self._columns))]
        print()
        for row in cells:
            aligned = [
                cell.ljust(width) if index == 0 else cell.rjust(width)
                for index, (cell, width) in enumerate(zip(row, widths, strict=False))
            ]
            print("  ".join([*aligned, *row[len(widths) :]]).rstrip())


def run_to_end(bench: Bench, main: Callable[[Bench], None]) -> None:
    """Run a benchmark's rows; the exit status says whether any failed."""
    with bench:
        main(bench)
    sys.exit(bench.failed)


def greedy(new_tokens: int) -> Result:
    """Sampling parameters of exactly `new_tokens` tokens."""
    return {"temperature": 0.0, "max_new_tokens": new_tokens, "ignore_eos": True}


def median_of(values: Sequence[float], digits: int = 3) -> float:
    return round(statistics.median(values), digits)


def percentile(values: Sequence[float], percent: int) -> float:
    """The smallest value that so many percent do not exceed."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def rounded(values: Sequence[float], digits: int = 3) -> list[float]:
    return [round(value, digits) for value in values]


def gpu_names() -> str:
    """The GPUs' names without repetition, or the processor's."""
    names = _nvidia_smi("name")
    return ", ".join(dict.fromkeys(names)) or platform.processor() or platform.machine()


def gpu_bytes_used() -> int | None:
    """Memory in use on the first GPU that this process may see, by whomever; None without one."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"
    used = _nvidia_smi("memory.used", f"--id={first}")
    return int(used[0]) << 20 if used else None


def _nvidia_smi(field: str, *options: str) -> list[str]:
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits", *options]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    except (OSError, subprocess.CalledProcessError):
        return []


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
