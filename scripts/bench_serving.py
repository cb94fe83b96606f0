"""Load over HTTP: requests arrive at random moments, each streams its answer, percentiles of what their clients saw.

    python scripts/bench_serving.py --model-shape llama-8b --json serving.jsonl [--rates 4 8 16] [--adapters 0 64]

Starts `python -m manylora.launch_server` on random weights, loads the adapters (rank 16), and for each row RxKy sends 512
requests (512 tokens in, 128 out, request i uses adapter i mod K) with exponential gaps of x a second on average.
ttft: from the request to its first token. itl: between two events of a stream, by the tokens the later one brought.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from bench_common import CONTEXT_LENGTH, ROOT, Bench, Result, greedy, make_arguments, percentile, run_to_end

RANK = 16
REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 512, 512, 128
READY_TIMEOUT_S = 300.0
STOP_TIMEOUT_S = 60.0
PERCENTILES = (50, 90, 99)
COLUMNS = (
    "tokens_per_s",
    "requests_per_s",
    *(f"{what}_ms_p{p}" for what in ("ttft", "itl") for p in PERCENTILES),
)


@dataclass(slots=True)
class Seen:
    """What one client saw, in seconds. gaps: of its tokens after the first, one entry a token."""

    ttft: float = 0.0
    gaps: list[float] = field(default_factory=list)
    num_tokens: int = 0


@asynccontextmanager
async def serving(bench: Bench, most_adapters: int) -> AsyncIterator[aiohttp.ClientSession]:
    """A server that is ready and has its adapters; the session's requests are relative to it."""
    port = free_port()
    flags = ["--model-path", str(bench.model_dir), "--load-format", "dummy", "--port", str(port)]
    flags += ["--context-length", str(CONTEXT_LENGTH), "--log-level", "warning", "--enable-lora"]
    flags += [
        "--max-loras-per-batch",
        str(max(1, most_adapters)),
        "--disable-radix-cache",
        *bench.server_argv,
    ]
    path = os.pathsep.join(filter(None, (str(ROOT / ".pkg"), os.environ.get("PYTHONPATH"))))
    process = subprocess.Popen(
        [sys.executable, "-m", "manylora.launch_server", *flags],
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    )
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    try:
        async with aiohttp.ClientSession(
            f"http://127.0.0.1:{port}", connector=connector, timeout=timeout, raise_for_status=True
        ) as session:
            await wait_ready(session, process)
            for index in range(most_adapters):
                body = {"lora_name": name_of(index), "lora_path": bench.adapter_dir(RANK)}
                async with session.post("/load_lora_adapter", json=body) as response:
                    await response.read()
            yield session
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(STOP_TIMEOUT_S)


async def wait_ready(session: aiohttp.ClientSession, process: subprocess.Popen[bytes]) -> None:
    """Raises RuntimeError if the server ends or takes too long."""
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            async with session.get("/health"):
                return
        except aiohttp.ClientError:
            await asyncio.sleep(0.2)
    raise RuntimeError("the server did not become ready")


async def one_request(session: aiohttp.ClientSession, body: dict[str, Any]) -> Seen:
    """Stream one answer to its end. Raises RuntimeError if it is cut short."""
    seen = Seen()
    last = started = time.perf_counter()
    async with session.post("/generate", json=body) as response:
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            now = time.perf_counter()
            event = json.loads(line[len(b"data: ") :])
            if "error" in event:
                raise RuntimeError(event["error"]["message"])
            fresh = event["meta_info"]["completion_tokens"] - seen.num_tokens
            if fresh == 0:
                continue
            if seen.num_tokens == 0:
                seen.ttft = now - started
            else:
                seen.gaps += [(now - last) / fresh] * fresh
            seen.num_tokens += fresh
            last = now
    wanted = body["sampling_params"]["max_new_tokens"]
    if seen.num_tokens != wanted:
        raise RuntimeError(f"an answer had {seen.num_tokens} of {wanted} tokens")
    return seen


async def load(bench: Bench, session: aiohttp.ClientSession, rate: float, num_adapters: int) -> Result:
    """One row of the results."""
    count = bench.shape.scaled(REQUESTS)
    new_tokens = bench.shape.scaled(NEW_TOKENS)
    bodies = [
        {
            "input_ids": ids,
            "lora_path": name_of(index % num_adapters) if num_adapters else None,
            "sampling_params": greedy(new_tokens),
            "stream": True,
        }
        for index, ids in enumerate(bench.prompts(count, bench.shape.scaled(PROMPT_TOKENS)))
    ]
    arrivals = bench.arrivals(count, rate)
    started = time.perf_counter()

    async def arrive(body: dict[str, Any], at: float) -> Seen:
        await asyncio.sleep(started + at - time.perf_counter())
        return await one_request(session, body)

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(arrive(body, at)) for body, at in zip(bodies, arrivals, strict=True)]
    seconds = time.perf_counter() - started
    seen = [task.result() for task in tasks]
    return {
        "rate": rate,
        "adapters": num_adapters,
        "requests": count,
        "seconds": round(seconds, 3),
        "requests_per_s": round(count / seconds, 2),
        "tokens_per_s": round(count * new_tokens / seconds, 1),
        **percentiles("ttft", [one.ttft for one in seen]),
        **percentiles("itl", [gap for one in seen for gap in one.gaps]),
    }


def percentiles(what: str, seconds: Sequence[float]) -> Result:
    return {f"{what}_ms_p{p}": round(1e3 * percentile(seconds, p), 2) for p in PERCENTILES}


def name_of(index: int) -> str:
    return f"adapter{index}"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


async def serve_rows(bench: Bench) -> None:
    rows = {f"R{rate:g}K{count}": (rate, count) for count in bench.args.adapters for rate in bench.args.rates}
    most = max(bench.args.adapters)
    async with serving(bench, most) as session:
        await load(bench, session, rate=max(bench.args.rates), num_adapters=most)
        for row, (rate, count) in rows.items():
            if not bench.wants(row):
                continue
            try:
                bench.add(row, **await load(bench, session, rate, count))
            except ExceptionGroup as group:
                bench.fail(row, group.exceptions[0])


def main(bench: Bench) -> None:
    bench.attempt("server", lambda: asyncio.run(serve_rows(bench)))


def parser() -> argparse.ArgumentParser:
    made = make_arguments(__doc__)
    made.add_argument("--rates", type=float, nargs="+", default=[4, 8, 16, 32], help="requests a second")
    made.add_argument("--adapters", type=int, nargs="+", default=[0, 64], help="distinct adapters")
    return made


if __name__ == "__main__":
    run_to_end(Bench("serving", parser(), COLUMNS), main)
