"""What the scheduler itself takes for a step, without workers: meanwhile the device has one other step to go on with.

    python scripts/bench_scheduler.py --model-shape llama-8b --json scheduler.jsonl [--only 512x128 …] [--pages N] [--steps N]

A row 512x128 is a server under full load: prompts of 512 random tokens, 128 new ones each, and as many requests waiting
that a place never stays free for want of them; a step has up to 256 rows and 8192 tokens. Steps count once the cache is
full, so that every page that is taken was another prefix's. No prompt begins like another: nothing is found in the cache.
Milliseconds from a step's answer to the next plan, packed; `tidy_ms` is what is left for quiet time
(scheduler/quiet_time.py). One run: what is looked for are its slowest steps.
"""

from __future__ import annotations

import gc
import itertools
import random
import statistics
import time
from array import array
from collections import deque

import msgspec
from bench_common import Bench, Result, make_arguments, run_to_end

from manylora.lora.page_layout import pool_geometry
from manylora.runtime.config import ModelArgs, ServerConfig
from manylora.runtime.messages import Abort, GenerateReq, GetState, State, Submit, pack_i64
from manylora.runtime.plan import ForwardBatch, ForwardOutput
from manylora.runtime.sampling_params import SamplingParams
from manylora.scheduler.quiet_time import leave_garbage, tidy_up
from manylora.scheduler.scheduler import PoolLimits, Scheduler

ROWS = ("512x128", "16x128", "1024x16")
COLUMNS = ("steps", "free_pages", "mean_ms", "p50_ms", "p99_ms", "p99_9_ms", "max_ms", "tidy_ms")
PAGE_SIZE = 16
WAITING = 64


class Load:
    """A scheduler with all the work it can take, and the worker's answers to it: random tokens."""

    def __init__(self, bench: Bench, prompt_tokens: int, new_tokens: int) -> None:
        config = ServerConfig(model=ModelArgs(model_path="any"))
        geometry = pool_geometry(bench.model, tp_size=1, sharding="slora", page_size=PAGE_SIZE, itemsize=2)
        limits = PoolLimits(num_pages=bench.args.pages, num_host_pages=0, num_slices=0)
        self.scheduler = Scheduler(config, bench.model, geometry, limits, seed=0)
        self._prompt_tokens = prompt_tokens
        self._params = SamplingParams(temperature=0.0, max_new_tokens=new_tokens, ignore_eos=True)
        self._random = random.Random(0)
        self._vocabulary = range(bench.model.vocab_size)
        self._handles = itertools.count(1)
        self._most = config.schedule.max_running_requests + WAITING
        self._encoder = msgspec.msgpack.Encoder()
        self._in_flight: deque[ForwardBatch] = deque()
        self._fill_queue(self._state())
        self._plan()

    def step(self) -> float:
        """Answer the oldest step; the seconds until the next is planned and packed."""
        plan = self._in_flight.popleft()
        answer = ForwardOutput(plan.step, self._tokens(plan.count("samples")))
        started = time.perf_counter()
        self.scheduler.on_worker(answer)
        self._plan()
        return time.perf_counter() - started

    def refill(self) -> int:
        """Submit as many requests as have ended. Returns how many pages are free."""
        state = self._state()
        self._fill_queue(state)
        return state.pages_free

    def finish(self) -> None:
        """Abort everything and let the last steps end."""
        self.scheduler.on_front(Abort(pack_i64(range(1, next(self._handles)))))
        while self._in_flight:
            self.step()

    def _state(self) -> State:
        self.scheduler.on_front(GetState(0))
        state = self.scheduler.to_front.pop()
        assert isinstance(state, State)
        return state

    def _fill_queue(self, state: State) -> None:
        requests = [
            GenerateReq(next(self._handles), self._tokens(self._prompt_tokens), self._params)
            for _ in range(self._most - state.running - state.waiting)
        ]
        self.scheduler.on_front(Submit(requests))

    def _plan(self) -> None:
        self.scheduler.schedule()
        for message in (*self.scheduler.to_workers, *self.scheduler.to_front):
            self._encoder.encode(message)
            if isinstance(message, ForwardBatch):
                self._in_flight.append(message)
        self.scheduler.to_workers.clear()
        self.scheduler.to_front.clear()

    def _tokens(self, count: int) -> bytes:
        return array("i", self._random.choices(self._vocabulary, k=count)).tobytes()


def measure(bench: Bench, prompt_tokens: int, new_tokens: int) -> Result:
    """One row."""
    gc.collect()  # the last row's scheduler
    load = Load(bench, prompt_tokens, new_tokens)
    while load.refill():
        load.step()
    times: list[float] = []
    free_pages = 0
    for _ in range(bench.args.steps):
        times.append(1e3 * load.step())
        free_pages = max(free_pages, load.refill())
    load.finish()
    started = time.perf_counter()
    tidy_up(load.scheduler)
    tidy_ms = 1e3 * (time.perf_counter() - started)
    per_mille = statistics.quantiles(times, n=1000, method="inclusive")
    return {
        "steps": len(times),
        "pages": bench.args.pages,
        "free_pages": free_pages,
        "mean_ms": round(statistics.mean(times), 3),
        "p50_ms": round(per_mille[499], 3),
        "p99_ms": round(per_mille[989], 3),
        "p99_9_ms": round(per_mille[998], 3),
        "max_ms": round(max(times), 3),
        "tidy_ms": round(tidy_ms, 3),
    }


def main(bench: Bench) -> None:
    leave_garbage()
    for row in bench.args.only or ROWS:
        prompt_tokens, new_tokens = map(int, row.split("x"))
        bench.measure(row, lambda p=prompt_tokens, n=new_tokens: measure(bench, p, n))


if __name__ == "__main__":
    parser = make_arguments(__doc__)
    parser.add_argument(
        "--pages", type=int, default=54_000, help="of the pool; default: an 8B model's on 140 GB"
    )
    parser.add_argument("--steps", type=int, default=4000, help="steps that count (default: 4000)")
    run_to_end(Bench("scheduler", parser, COLUMNS), main)
