"""How a sequence ends, and what text, ids and logprobs then are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.errors import (
    NonFiniteLogitsError,
)
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.answer import Stop
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from tests.tokenizer_manager.fake_scheduler import (
    in_loop,
    until,
)
from tests.tokenizer_manager.managed import collect, ids_of, managed, one
from tests.tokenizer_manager.tiny_tokenizer import BOS_ID, EOS_ID, EOT_ID


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
