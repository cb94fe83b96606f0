"""TokenizerManager against a scheduler at the other end of a real pipe."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.errors import (
    AdapterNotFoundError,
    BadRequestError,
    BusyError,
    ContextLengthError,
    ManyloraError,
    NonFiniteLogitsError,
    NotReadyError,
    ProtocolError,
    QueueFullError,
    WorkerCrashedError,
)
from manylora.runtime.messages import GenerateReq, StepOutput, Submit, pack_i32, pack_i64
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.answer import Aborted, Answer, Length, Stop
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.tokenizer_manager import INLINE_CHARACTERS, TokenizerManager
from tests.tokenizer_manager.fake_scheduler import (
    CACHED_TOKENS,
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    FakeScheduler,
    fake_pair,
    in_loop,
    until,
)
from tests.tokenizer_manager.tiny_tokenizer import BOS_ID, EOS_ID, EOT_ID, save_byte_level


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@asynccontextmanager
async def managed(tokenizer_dir: Path) -> AsyncIterator[tuple[TokenizerManager, FakeScheduler]]:
    async with fake_pair() as (scheduler, pipe):
        manager = TokenizerManager(pipe)
        try:
            await scheduler.announce(tokenizer_dir)
            await manager.start()
            yield manager, scheduler
        finally:
            manager.close()


def one(text: str = "Paris.", *, rid: str = "a", lora_name: str | None = None, **params: Any) -> GenerateCall:
    return GenerateCall([Prompt(rid, SamplingParams(**params), text=text, lora_name=lora_name)])


def ids_of(manager: TokenizerManager, text: str) -> list[int]:
    """Without BOS."""
    return manager.tokenizer.encode([text])[0][1:]


async def collect(manager: TokenizerManager, call: GenerateCall) -> list[Answer]:
    return [answer async for answers in manager.stream(call) for answer in answers]


# ---- whole answers --------------------------------------------------------------------------------------------------


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


# ---- ends -----------------------------------------------------------------------------------------------------------


@in_loop
async def test_stop_id_is_counted_and_not_shown(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        ids = ids_of(manager, "Paris.")
        scheduler.answer = lambda _: [*ids, EOS_ID]
        [answer] = await manager.generate(one(skip_special_tokens=False))
        assert (answer.text, answer.output_ids) == ("Paris.", [*ids, EOS_ID])
        assert answer.meta_info.finish_reason == Stop(EOS_ID)
        [answer] = await manager.generate(one(skip_special_tokens=False, no_stop_trim=True))
        assert answer.text == "Paris.<|eos|>"
        [answer] = await manager.generate(one(stop_token_ids=[ids[0]]))
        assert (answer.text, answer.output_ids) == ("", ids[:1])
        assert answer.meta_info.finish_reason == Stop(ids[0])
        assert scheduler.aborted == []


@in_loop
async def test_stop_string_across_tokens_cuts_everything_at_the_match(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        ids = [manager.tokenizer.pieces.index(bytes([byte])) for byte in "say 日本, then more".encode()]
        scheduler.answer = lambda _: [*ids, *ids]
        params = SamplingParams(stop=["never", "日本"], max_new_tokens=30)
        prompt = Prompt("a", params, text="x", return_logprob=True, top_logprobs_num=2)
        [answer] = await manager.generate(GenerateCall([prompt]))
        count = len("say 日本".encode())
        assert answer.text == "say "
        assert answer.output_ids == ids[:count]
        assert answer.meta_info.finish_reason == Stop("日本")
        assert answer.meta_info.completion_tokens == count
        assert [triple[1] for triple in answer.meta_info.output_token_logprobs or ()] == ids[:count]
        assert len(answer.meta_info.output_top_logprobs or ()) == count
        await until(lambda: scheduler.aborted == [1])
        assert not scheduler.running

        [answer] = await manager.generate(one(stop="日本", no_stop_trim=True, rid="b"))
        assert answer.text == "say 日本"


@in_loop
async def test_stop_string_overrides_an_end_found_meanwhile(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        ids = ids_of(manager, "Paris.")
        scheduler.tokens_per_step = len(ids) + 1
        scheduler.answer = lambda _: [*ids, EOS_ID]
        for max_new_tokens in (len(ids), None):
            [answer] = await manager.generate(one(stop="ar", max_new_tokens=max_new_tokens))
            assert answer.text == "P"
            assert answer.meta_info.finish_reason == Stop("ar")
            assert manager.tokenizer.decode(answer.output_ids).count("ar") == 1
            assert manager.tokenizer.decode(answer.output_ids[:-1]).count("ar") == 0
        assert scheduler.aborted == []  # it had ended them itself


@in_loop
async def test_no_stop_string_before_min_new_tokens(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        x, y = (manager.tokenizer.pieces.index(char) for char in (b"x", b"y"))
        scheduler.answer = lambda _: [x, y] * 20
        [answer] = await manager.generate(one(stop="x", min_new_tokens=4))
        assert answer.text == "xyxy"
        assert answer.output_ids == [x, y, x, y, x]


@in_loop
async def test_half_a_character_at_the_end(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        bytes_of_e = [manager.tokenizer.pieces.index(bytes([byte])) for byte in "é".encode()]
        scheduler.answer = lambda _: bytes_of_e
        [answer] = await manager.generate(one(max_new_tokens=1))
        assert answer.text == "\N{REPLACEMENT CHARACTER}" == manager.tokenizer.decode(answer.output_ids)


@in_loop
async def test_an_error_ends_the_whole_call(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.failing_token = (2, NonFiniteLogitsError("the logits are not finite"))
        with pytest.raises(NonFiniteLogitsError, match="not finite"):
            await manager.generate(one())
        with pytest.raises(NonFiniteLogitsError):
            await collect(manager, one(n=3))
        scheduler.failing_token = None
        assert len(await manager.generate(one())) == 1  # the same rid is free again


# ---- streams --------------------------------------------------------------------------------------------------------


@in_loop
async def test_stream_grows_to_the_whole_answer(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        text = "日本の首都は東京です。 🙂 naïve"
        scheduler.answer = lambda _: ids_of(manager, text)
        call = one(max_new_tokens=len(ids_of(manager, text)))
        parts = await collect(manager, call)
        assert len(parts) > 5
        for earlier, later in pairwise(parts):
            assert later.text.startswith(earlier.text)
            assert earlier.meta_info.finish_reason is None
            assert "\N{REPLACEMENT CHARACTER}" not in earlier.text
        assert parts[-1].text == text
        assert parts[-1].meta_info.finish_reason == Length(len(parts[-1].output_ids))


@in_loop
async def test_stream_never_shows_a_part_of_a_stop_string(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        letters = [manager.tokenizer.pieces.index(char.encode()) for char in "one two three END four"]
        scheduler.answer = lambda _: letters
        parts = await collect(manager, one(stop=[" END", " thx"]))
        texts = [part.text for part in parts]
        assert texts[-1] == "one two three"
        assert "one two" in texts
        assert not any(text.endswith((" ", "E", "EN", " t", " th")) for text in texts)
        assert all(later.startswith(earlier) for earlier, later in pairwise(texts))


@in_loop
async def test_slow_reader_gets_fewer_and_longer_parts(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        count = 0
        last: list[Answer] = []
        async for answers in manager.stream(one(max_new_tokens=40)):
            count, last = count + 1, answers
            await asyncio.sleep(0.05)
        assert last[0].meta_info.completion_tokens == 40
        assert count < 20


@in_loop
async def test_a_caller_that_leaves_aborts_what_runs(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        async with contextlib.aclosing(manager.stream(one(n=2))) as answers:
            await anext(answers)
        await until(lambda: scheduler.aborted == [1, 2])

        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one()))
        await until(lambda: 3 in scheduler.running)
        waiting.cancel()
        await until(lambda: scheduler.aborted == [1, 2, 3])


@in_loop
async def test_late_tokens_are_dropped(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        scheduler.held = True
        waiting = asyncio.create_task(manager.generate(one()))
        await until(lambda: 1 in scheduler.running)
        waiting.cancel()
        await until(lambda: scheduler.aborted == [1])
        scheduler.pipe.send(StepOutput(pack_i64([1, 99]), pack_i32([5, 5])))
        scheduler.held = False
        [answer] = await manager.generate(one(max_new_tokens=1))
        assert answer.meta_info.completion_tokens == 1


# ---- refusals -------------------------------------------------------------------------------------------------------

REFUSED = [
    (Prompt("a", SamplingParams(), text=""), "text cannot be empty"),
    (Prompt("a", SamplingParams(), input_ids=[]), "input_ids cannot be empty"),
    (Prompt("a", SamplingParams(), input_ids=[1, VOCAB_SIZE]), f"input_ids holds {VOCAB_SIZE}"),
    (Prompt("a", SamplingParams(), input_ids=[-1]), "input_ids holds -1"),
    (Prompt("a", SamplingParams(top_p=0.0), text="x"), "top_p must be in"),
    (Prompt("a", SamplingParams(stop="x" * 1025), text="x"), "at most 1024 characters"),
    (Prompt("a", SamplingParams(stop_token_ids=[1] * 64), text="x"), "stop_token_ids takes at most 63 ids"),
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


# ---- aborts, administration, failure --------------------------------------------------------------------------------


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


# ---- logprobs -------------------------------------------------------------------------------------------------------


@in_loop
async def test_logprob_triples(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, _):
        prompt = Prompt(
            "a",
            SamplingParams(max_new_tokens=2),
            input_ids=[BOS_ID, 40, 50],
            return_logprob=True,
            top_logprobs_num=2,
            logprob_start_len=0,
        )
        [answer] = await manager.generate(GenerateCall([prompt]))
        meta = answer.meta_info
        assert meta.input_token_logprobs == [(None, BOS_ID, None), (-20.0, 40, None), (-25.0, 50, None)]
        assert meta.output_token_logprobs == [(-20.0, 40, None), (-25.0, 50, None)]
        best: list[Any] = [(0.0, 0, None), (-0.5, 1, None)]
        assert meta.input_top_logprobs == [None, best, best]
        assert meta.output_top_logprobs == [best, best]


@in_loop
async def test_logprobs_of_the_answer_only_and_with_text(tokenizer_dir: Path) -> None:
    async with managed(tokenizer_dir) as (manager, scheduler):
        x = manager.tokenizer.pieces.index(b"x")
        scheduler.answer = lambda _: [x, EOT_ID]
        prompt = Prompt(
            "a",
            SamplingParams(max_new_tokens=2),
            text="y",
            return_logprob=True,
            return_text_in_logprobs=True,
        )
        [answer] = await manager.generate(GenerateCall([prompt]))
        meta = answer.to_dict()["meta_info"]
        assert meta["input_token_logprobs"] == []
        assert meta["output_token_logprobs"] == [(-x / 2, x, "x"), (-EOT_ID / 2, EOT_ID, "<|eot|>")]
        assert "output_top_logprobs" not in meta
