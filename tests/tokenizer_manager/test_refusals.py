"""What is refused, before the scheduler or by it."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.errors import (
    AdapterNotFoundError,
    BadRequestError,
    ContextLengthError,
    QueueFullError,
)
from manylora.runtime.messages import Submit
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from tests.tokenizer_manager.fake_scheduler import (
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    in_loop,
    until,
)
from tests.tokenizer_manager.managed import collect, managed, one

REFUSED = [
    (Prompt("a", SamplingParams(), text=""), "text cannot be empty"),
    (Prompt("a", SamplingParams(), input_ids=[]), "input_ids cannot be empty"),
    (Prompt("a", SamplingParams(), input_ids=[1, VOCAB_SIZE]), f"input_ids holds {VOCAB_SIZE}"),
    (Prompt("a", SamplingParams(), input_ids=[-1]), "input_ids holds -1"),
    (Prompt("a", SamplingParams(top_p=0.0), text="x"), "top_p must be in"),
    (Prompt("a", SamplingParams(stop="x" * 1025), text="x"), "at most 1024 characters"),
    (Prompt("a", SamplingParams(stop_token_ids=[1] * 64), text="x"), "stop_token_ids takes at most 63 ids"),
    (Prompt("r" * 513, SamplingParams(), text="x"), "rid has at most 512 characters"),
    (Prompt("a", SamplingParams(seed=1, sampling_seed=2), text="x"), "two names of one value"),
    (Prompt("a", SamplingParams(), text="x", top_logprobs_num=-1), "top_logprobs_num must be in"),
    (Prompt("a", SamplingParams(), text="x", top_logprobs_num=129), "top_logprobs_num must be in"),
    (Prompt("a", SamplingParams(), input_ids=[5, 5], logprob_start_len=2), "logprob_start_len must be in"),
    (Prompt("a", SamplingParams(), input_ids=[5], logprob_start_len=-2), "logprob_start_len must be in"),
]


@pytest.mark.parametrize(("prompt", "message"), REFUSED, ids=[message for _, message in REFUSED])
@in_loop
async def test_refused_before_the_scheduler(tokenizer_dir: Path, prompt: Prompt, message: str) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        good = Prompt("good", SamplingParams(), text="x")
        with pytest.raises(BadRequestError, match=message):
            await manager.generate(GenerateCall([good, prompt], as_list=True))
        await manager.state()
        assert not any(isinstance(message, Submit) for message in scheduler.received)


@in_loop
async def test_what_no_message_can_hold_is_refused_and_forgotten(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        for _ in range(2):
            with pytest.raises(BadRequestError, match="not valid Unicode"):
                await manager.generate(one(rid="a", lora_name="\ud800"))
        await manager.generate(one(rid="a", max_new_tokens=1))


@in_loop
async def test_a_token_that_only_the_tokenizer_knows_is_refused(tokenizer_dir: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(tokenizer_dir, tmp_path / "tokenizer")
    path = directory / "tokenizer.json"
    layout = json.loads(path.read_text())
    layout["added_tokens"].append(
        {
            "id": VOCAB_SIZE,
            "content": "[PAD]",
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
    )
    path.write_text(json.dumps(layout))
    async with managed(directory) as (manager, scheduler):
        with pytest.raises(BadRequestError, match=f"text has the token {VOCAB_SIZE}") as refused:
            await manager.generate(one("a [PAD] b"))
        assert refused.value.param == "text"
        await manager.generate(one("a b", max_new_tokens=1))
        [submit] = [message for message in scheduler.received if isinstance(message, Submit)]
        assert len(submit.requests) == 1


@pytest.mark.parametrize(
    ("num_ids", "params", "message"),
    [
        (CONTEXT_LENGTH, {}, "leaves no room in the model's context of 256 tokens"),
        (CONTEXT_LENGTH + 1, {"max_new_tokens": 0}, "leaves no room"),
        (200, {"max_new_tokens": 57}, "together 257, more than the model's context of 256 tokens"),
        (200, {"min_new_tokens": 57}, "min_new_tokens is 57"),
    ],
)
@in_loop
async def test_context_is_never_exceeded(
    tokenizer_dir: Path, num_ids: int, params: dict[str, Any], message: str
) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        prompt = Prompt("a", SamplingParams(**params), input_ids=[5] * num_ids)
        with pytest.raises(ContextLengthError, match=message):
            await manager.generate(GenerateCall([prompt]))


@in_loop
async def test_refused_by_the_scheduler(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        with pytest.raises(AdapterNotFoundError, match="not loaded: ghost") as refused:
            await manager.generate(one(lora_name="ghost"))
        assert refused.value.info().status == 400
        scheduler.refusal = QueueFullError("the queue is full")
        with pytest.raises(QueueFullError):
            await collect(manager, one())
        await manager.state()
        assert scheduler.aborted == []


@in_loop
async def test_request_ids_are_unique_while_they_run(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        with pytest.raises(BadRequestError, match="Duplicate request ID detected: same"):
            await manager.generate(GenerateCall([*one(rid="same").prompts, *one(rid="same").prompts]))
        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one(rid="busy", max_new_tokens=1)))
        await until(lambda: scheduler.running)
        with pytest.raises(BadRequestError, match="Duplicate request ID detected: busy"):
            await manager.generate(one(rid="busy"))
        scheduler.held = False
        await waiting
        await manager.generate(one(rid="busy", max_new_tokens=1))
