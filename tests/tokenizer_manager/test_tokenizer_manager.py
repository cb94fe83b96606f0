"""Whole answers, aborts, administration and failure, against a scheduler at the other end of a real pipe."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from manylora.runtime.errors import (
    BusyError,
    ContextLengthError,
    ManyloraError,
    NotReadyError,
    ProtocolError,
    WorkerCrashedError,
)
from manylora.runtime.messages import GenerateReq, StepOutput, Submit, pack_i32, pack_i64
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.answer import Aborted, Length
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.tokenizer_manager import INLINE_CHARACTERS, TokenizerManager
from tests.tokenizer_manager.fake_scheduler import (
    CACHED_TOKENS,
    CONTEXT_LENGTH,
    fake_pair,
    in_loop,
    until,
)
from tests.tokenizer_manager.managed import collect, ids_of, managed, one


@in_loop
async def test_answer_is_complete(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        await manager.load_adapter("x", "path/x")
        ids = ids_of(manager, "Paris.")
        [answer] = await manager.generate(one(max_new_tokens=len(ids) + 1, lora_name="x"))
        assert answer.text == manager.tokenizer.decode([*ids, ids[0]])
        assert answer.output_ids == [*ids, ids[0]]
        meta = answer.meta_info
        assert (meta.id, meta.finish_reason) == ("a", Length(len(ids) + 1))
        assert (meta.prompt_tokens, meta.completion_tokens) == (len(ids) + 1, len(ids) + 1)
        assert (meta.cached_tokens, meta.lora_name, meta.lora_version) == (CACHED_TOKENS, "x", 1)
        assert 0 < meta.e2e_latency < 20
        assert scheduler.aborted == []


@in_loop
async def test_submit_holds_what_was_asked(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        await manager.load_adapter("x", "path/x")
        params = SamplingParams(max_new_tokens=2, sampling_seed=7, n=2)
        prompts = [
            Prompt("a", params, input_ids=[5, 6, 7], lora_name="x"),
            Prompt("b", SamplingParams(), text="Tokyo", return_logprob=True, logprob_start_len=1),
        ]
        await manager.generate(GenerateCall(prompts, as_list=True))
        [submit] = [message for message in scheduler.received if isinstance(message, Submit)]
        first, second = submit.requests
        assert first == GenerateReq(
            1, pack_i32([5, 6, 7]), SamplingParams(max_new_tokens=2, seed=7, n=2), "x", -1, -1
        )
        assert (second.handle, second.lora_name) == (3, None)
        assert (second.num_top, second.logprob_start_len) == (0, 1)
        assert second.params.max_new_tokens == 128


@in_loop
async def test_samples_of_one_prompt_lie_together(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        params = SamplingParams(max_new_tokens=1)
        prompts = [
            Prompt("a", params, input_ids=[9, 10]),
            Prompt("b", SamplingParams(max_new_tokens=1, n=2), input_ids=[9, 20]),
            Prompt("c", params, input_ids=[9, 30]),
        ]
        answers = await manager.generate(GenerateCall(prompts, as_list=True))
        assert [answer.output_ids for answer in answers] == [[10], [20], [20], [30]]
        assert not any("index" in answer.to_dict() for answer in answers)
        assert [answer.meta_info.id for answer in answers] == ["a", "b_0", "b_1", "c"]


@in_loop
async def test_default_length_is_what_the_context_leaves(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        prompt = Prompt("a", SamplingParams(ignore_eos=True), input_ids=[5] * (CONTEXT_LENGTH - 7))
        [answer] = await manager.generate(GenerateCall([prompt]))
        assert answer.meta_info.finish_reason == Length(7)
        [answer] = await manager.generate(one())
        assert answer.meta_info.finish_reason == Length(128)


@in_loop
async def test_no_new_tokens_at_all(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        [answer] = await manager.generate(one(max_new_tokens=0))
        assert (answer.text, answer.output_ids) == ("", [])
        assert answer.meta_info.finish_reason == Length(0)


@in_loop
async def test_a_long_text_is_tokenized_beside_the_loop(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        text = "The capital of France is Paris. " * (INLINE_CHARACTERS // 16)
        with pytest.raises(ContextLengthError, match=r"The prompt has \d+ tokens"):
            await manager.generate(one(text))


@in_loop
async def test_abort_by_prefix_answers_what_there_is(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        calls = [asyncio.create_task(manager.generate(one(rid=rid))) for rid in ("job-1", "job-2", "other")]
        await until(lambda: len(scheduler.running) == 3)
        scheduler.held = True
        handles = {s.handle for s in scheduler.running.values()}
        manager.abort("job")
        for call in calls[:2]:
            [answer] = await call
            assert answer.meta_info.finish_reason == Aborted("Aborted by /abort_request.")
            assert answer.text == manager.tokenizer.decode(answer.output_ids)
        manager.abort("no such")
        assert not calls[2].done()
        manager.abort("", abort_all=True)
        await calls[2]
        await until(lambda: set(scheduler.aborted) == handles)


@in_loop
async def test_adapters_come_and_go(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        reply = await manager.load_adapter("x", "path/x", pinned=True)
        assert (reply.error, reply.loaded, reply.lora_version) == (None, {"x": "path/x"}, 1)
        reply = await manager.load_adapter("x", "path/y")
        assert reply.error is not None
        assert (reply.error.code, reply.loaded) == ("adapter_exists", {"x": "path/x"})
        replies = await asyncio.gather(
            manager.load_adapter("x", "path/y", replace=True), manager.load_adapter("z", "path/z")
        )
        assert [reply.lora_version for reply in replies] == [2, 3]
        assert [a.lora_name for a in (await manager.state()).adapters] == ["x", "z"]
        assert (await manager.unload_adapter("x")).loaded == {"z": "path/z"}
        reply = await manager.unload_adapter("x")
        assert reply.error is not None
        assert reply.error.code == "adapter_not_found"


@in_loop
async def test_a_hostile_name_stays_in_its_line_of_the_log(
    tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        with caplog.at_level("INFO", "manylora.front"):
            await manager.load_adapter("a\n[scheduler] all is well", "x" * 10**6)
            await manager.unload_adapter("a\n[scheduler] all is well")
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert all("\n" not in line and len(line) < 2000 for line in lines)


@in_loop
async def test_flush_needs_an_idle_server(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        await manager.flush_cache()
        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one(max_new_tokens=1)))
        await until(lambda: scheduler.running)
        with pytest.raises(BusyError):
            await manager.flush_cache()
        scheduler.held = False
        await waiting


@in_loop
async def test_failure_ends_everything_that_waits(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.held = True
        calls = [
            asyncio.create_task(manager.generate(one(rid="a"))),
            asyncio.create_task(collect(manager, one(rid="b", n=2))),
        ]
        await until(lambda: len(scheduler.running) == 3)
        error = WorkerCrashedError("worker 1 died")
        manager.fail(error)
        manager.fail(ManyloraError("a later one"))
        for call in calls:
            with pytest.raises(WorkerCrashedError, match="worker 1 died"):
                await call
        for late in (manager.generate(one()), manager.state(), manager.load_adapter("x", "y")):
            with pytest.raises(WorkerCrashedError):
                await late
        assert await manager.wait_failed() is error


@in_loop
async def test_a_broken_pipe_is_a_failure(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one()))
        await until(lambda: scheduler.running)
        scheduler.pipe.socket.send(b"garbage")
        with pytest.raises(ProtocolError, match="a frame of 7 bytes"):
            await waiting
        assert manager.failure is not None


@in_loop
async def test_a_fault_of_ours_leaves_nobody_waiting(
    tokenizer_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one()))
        await until(lambda: scheduler.running)
        scheduler.pipe.send(StepOutput(pack_i64([1, 1]), pack_i32([5])))
        with pytest.raises(ManyloraError, match="Internal error"):
            await waiting
        assert "could not be applied" in caplog.text


@in_loop
async def test_nothing_before_server_info(tokenizer_dir: Path) -> None:
    async with fake_pair() as (scheduler, pipe):
        manager = TokenizerManager(pipe)
        with pytest.raises(NotReadyError):
            await manager.generate(one())
        starting = asyncio.create_task(manager.start())
        await scheduler.announce(tokenizer_dir)
        assert (await starting).context_length == CONTEXT_LENGTH
        manager.close()


@in_loop
async def test_a_failure_ends_the_start(tokenizer_dir: Path) -> None:
    async with fake_pair() as (_, pipe):
        manager = TokenizerManager(pipe)
        starting = asyncio.create_task(manager.start())
        await asyncio.sleep(0)
        manager.fail(WorkerCrashedError("no memory"))
        with pytest.raises(WorkerCrashedError, match="no memory"):
            await starting
