"""Hundreds of concurrent requests over signature adapters that change under them: not one wrong token, nothing lost.

Every answer must be one token, repeated, of a version that its name honestly had while the request ran; every refusal a
400 for a name that was not there. Afterwards the ledger and the processes are what they were.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import aiohttp
import pytest
import torch

from tests.e2e.churn import Churn, Name
from tests.server import Server, running_server
from tests.signature import BASE_TOKEN, build_signature_model, signature_prompt

NUM_NAMES = 24
NUM_CHANGERS = 2
# Few prompts, so that prefixes are shared, of lengths around the page size.
PROMPTS = [signature_prompt(length, seed=length) for length in (3, 15, 16, 17, 33, 60, 64, 90, 130)]


class Case(NamedTuple):
    tp: int
    sharding: str
    dtype: str
    num_requests: int
    device: str = "cpu"
    max_new_tokens: int = 16
    room: int = 1024  # tokens: too little for all that runs
    min_tokens: int = 0  # that must have been judged in the end


CPU = [
    pytest.param(Case(2, "slora", "float32", 500), id="tp2-slora-float32"),
    pytest.param(Case(2, "replicated", "bfloat16", 150), id="tp2-replicated-bfloat16"),
]
GPU = [
    pytest.param(Case(1, "slora", dtype, 1000, "cuda"), id=f"cuda-{dtype}", marks=pytest.mark.gpu)
    for dtype in ("float32", "bfloat16")
]
GPU += [
    pytest.param(
        Case(1, "slora", "bfloat16", 7200, "cuda", max_new_tokens=400, room=16384, min_tokens=10**6),
        id="cuda-million",
        marks=[pytest.mark.gpu, pytest.mark.slow, pytest.mark.timeout(400)],
    )
]
MULTIGPU = [
    pytest.param(
        Case(2, sharding, dtype, 1000, "cuda"),
        id=f"cuda-tp2-{sharding}-{dtype}",
        marks=pytest.mark.multigpu,
    )
    for sharding in ("slora", "replicated")
    for dtype in ("float32", "bfloat16")
]


@dataclass
class Traffic:
    """What happened to the requests: counts by outcome, and every lie, in words."""

    outcomes: Counter[str] = field(default_factory=Counter)
    lies: list[str] = field(default_factory=list)
    token_of_version: dict[int, int] = field(default_factory=dict)
    num_cached_tokens: int = 0
    num_judged_tokens: int = 0

    def judge_answer(self, name: Name | None, answer: Any, sent: float, asked: int) -> None:
        tokens, meta = answer["output_ids"], answer["meta_info"]
        honest = name.honest_tokens(sent, time.monotonic()) if name else {BASE_TOKEN}
        said = set(tokens)
        known = self.token_of_version.setdefault(meta["lora_version"], tokens[0])
        if len(said) != 1 or not said <= honest or known not in said or len(tokens) != asked:
            self.lies.append(f"{name and name.lora_name}: said {tokens}, honest were {honest}; {meta}")
        self.outcomes["answered"] += 1
        self.num_cached_tokens += meta["cached_tokens"]
        self.num_judged_tokens += len(tokens)

    def judge_refusal(self, name: Name | None, reply: Any, status: int, sent: float) -> None:
        code = reply["error"].get("code")
        if status != 400 or code != "adapter_not_found" or name is None:
            self.lies.append(f"{name and name.lora_name}: refused with {status} {reply}")
        elif not name.may_be_missing(sent, time.monotonic()):
            self.lies.append(f"{name.lora_name}: called missing while it was loaded")
        self.outcomes["refused"] += 1


@pytest.fixture(scope="module")
def signature_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """dtype -> the signature model stored in it."""
    root = tmp_path_factory.mktemp("signature-models")
    for dtype in (torch.float32, torch.bfloat16):
        build_signature_model(root / str(dtype), dtype)
    return {"float32": root / "torch.float32", "bfloat16": root / "torch.bfloat16"}


@pytest.mark.parametrize("case", [*CPU, *GPU, *MULTIGPU])
def test_no_token_is_wrong_while_adapters_change(
    signature_models: dict[str, Path], tmp_path: Path, case: Case
) -> None:
    with running_server(
        signature_models[case.dtype],
        *("--tp-size", case.tp, "--lora-sharding", case.sharding, "--dtype", case.dtype),
        *("--enable-lora", "--max-loras-per-batch", 6, "--max-loaded-loras", 12),
        *("--max-total-tokens", case.room, "--chunked-prefill-size", 256, "--max-running-requests", 96),
        *("--max-queued-requests", case.num_requests),
        device=case.device,
        log_dir=tmp_path,
    ) as server:
        assert server.post("/flush_cache", {}).status == 200  # the warm-up left a prefix
        children, before = server.children(), server.ledger()
        traffic = asyncio.run(run_traffic(server, tmp_path, case))
        assert not traffic.lies, "\n".join(traffic.lies[:20])
        assert traffic.outcomes["answered"] > 0.5 * case.num_requests, traffic.outcomes
        assert traffic.num_judged_tokens >= case.min_tokens
        assert traffic.num_cached_tokens > 0  # prefixes were found in spite of all
        server.wait_idle()
        assert server.post("/flush_cache", {}).status == 200
        after = server.ledger()
        moving = {"steps", "preemptions"}
        assert {**after, **dict.fromkeys(moving)} == {**before, **dict.fromkeys(moving)}
        assert server.children() == children


async def run_traffic(server: Server, directory: Path, case: Case) -> Traffic:
    """All requests at once, started over a few seconds, while two changers load, replace and unload."""
    traffic, churn = Traffic(), Churn(server.url, directory, NUM_NAMES, seed=1)
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=300)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        await asyncio.gather(*(churn.load(session, name) for name in churn.names if name.number % 4))
        changers = [asyncio.create_task(churn.run(session)) for _ in range(NUM_CHANGERS)]
        gap = 8.0 / case.num_requests
        requests = [
            one_request(server.url, session, churn, traffic, random.Random(i), i * gap, case.max_new_tokens)
            for i in range(case.num_requests)
        ]
        await asyncio.gather(*requests)
        churn.stopped = True
        await asyncio.gather(*changers)
        await churn.unload_all(session)
    assert churn.changes >= 10
    return traffic


async def one_request(
    url: str,
    session: aiohttp.ClientSession,
    churn: Churn,
    traffic: Traffic,
    rng: random.Random,
    delay: float,
    max_new_tokens: int,
) -> None:
    """One in ten asks the base model, one in ten leaves after the first token."""
    await asyncio.sleep(delay)
    name = rng.choice(churn.names) if rng.random() < 0.9 else None
    num_tokens = rng.randint(1, max_new_tokens)
    body = {
        "input_ids": rng.choice(PROMPTS),
        "lora_path": name.lora_name if name else None,
        "sampling_params": {"temperature": 0, "max_new_tokens": num_tokens},
        "stream": rng.random() < 0.1,
    }
    sent = time.monotonic()
    async with session.post(url + "/generate", json=body) as response:
        if response.status != 200:
            traffic.judge_refusal(name, await response.json(), response.status, sent)
        elif body["stream"]:
            await response.content.readline()
            traffic.outcomes["left"] += 1
        else:
            traffic.judge_answer(name, await response.json(), sent, num_tokens)
