"""`/generate` over HTTP: every field, every refusal, streams, clients that leave."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.errors import QueueFullError
from manylora.runtime.http.common import MAX_BODY_BYTES
from manylora.runtime.messages import Submit
from tests.runtime.http_front import served
from tests.tokenizer_manager.fake_scheduler import CACHED_TOKENS, VOCAB_SIZE, in_loop
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

GREEDY = {"temperature": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@in_loop
async def test_one_text(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        status, answer = await front.post("/generate", {"text": "Paris", "sampling_params": GREEDY})
        assert status == 200
        assert set(answer) == {"text", "output_ids", "meta_info"}
        assert len(answer["output_ids"]) == 4
        meta = answer["meta_info"]
        assert 0 < meta.pop("e2e_latency") < 20
        assert len(meta.pop("id")) == 32
        ids = front.state.manager.tokenizer.encode(["Paris"])[0]
        assert meta == {
            "finish_reason": {"type": "length", "length": 4},
            "prompt_tokens": len(ids),
            "completion_tokens": 4,
            "cached_tokens": CACHED_TOKENS,
            "lora_name": None,
            "lora_version": 0,
        }
        async with front.client.put("/generate", json={"text": "Paris"}) as response:
            assert response.status == 200


@in_loop
async def test_mixed_batch_as_in_the_seeds(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        await front.post("/load_lora_adapter", {"lora_name": "lora0", "lora_path": "some/adapter"})
        body = {
            "text": ["List 3 countries and their capitals.", "AI is a field of computer science focused on"],
            "sampling_params": {"max_new_tokens": 32, "temperature": 0},
            "lora_path": ["lora0", None],
        }
        status, answers = await front.post("/generate", body)
        assert status == 200
        names = [(a["meta_info"]["lora_name"], a["meta_info"]["lora_version"]) for a in answers]
        assert names == [("lora0", 1), (None, 0)]
        assert [a["meta_info"]["completion_tokens"] for a in answers] == [32, 32]


@pytest.mark.parametrize(
    ("body", "num_answers"),
    [
        ({"text": "x"}, None),
        ({"text": ["x"]}, 1),
        ({"input_ids": [5, 6]}, None),
        ({"input_ids": [[5, 6], [7]]}, 2),
        ({"text": "x", "sampling_params": {"n": 3}}, 3),
        ({"text": ["x", "y"], "sampling_params": [{"n": 2}, {}]}, 3),
        ({"text": "x", "lora_path": None, "image_data": None, "log_metrics": False}, None),
        ({"text": "x", "sampling_params": None, "rid": None}, None),
    ],
)
@in_loop
async def test_a_list_is_answered_by_a_list(
    tokenizer_dir: Path, body: dict[str, Any], num_answers: int | None
) -> None:
    async with served(tokenizer_dir) as front:
        status, answer = await front.post("/generate", body)
        assert status == 200
        assert (len(answer) if isinstance(answer, list) else None) == num_answers


@in_loop
async def test_every_sampling_parameter_reaches_the_scheduler(tokenizer_dir: Path) -> None:
    given: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "max_new_tokens": 3,
        "min_new_tokens": 1,
        "stop": ["never"],
        "stop_token_ids": [9],
        "ignore_eos": True,
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
        "no_stop_trim": True,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
        "n": 2,
        "seed": 11,
    }
    async with served(tokenizer_dir) as front:
        status, _ = await front.post("/generate", {"text": "x", "sampling_params": given})
        assert status == 200
        [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        [request] = submit.requests
        assert {name: getattr(request.params, name) for name in given} == given


@in_loop
async def test_request_ids(tokenizer_dir: Path) -> None:
    async def ids(**body: Any) -> list[str]:
        _, answers = await front.post("/generate", body | {"sampling_params": {"max_new_tokens": 1}})
        return [a["meta_info"]["id"] for a in (answers if isinstance(answers, list) else [answers])]

    async with served(tokenizer_dir) as front:
        assert await ids(text="x", rid="mine") == ["mine"]
        assert await ids(text=["x", "y"], rid="mine") == ["mine_0", "mine_1"]
        assert await ids(text=["x", "y"], rid=["a", "b"]) == ["a", "b"]


@in_loop
async def test_logprobs(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        body = {
            "input_ids": [0, 40],
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 1,
        }
        _, answer = await front.post("/generate", body)
        meta = answer["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 0, None], [-20.0, 40, None]]
        assert meta["output_token_logprobs"] == [[-20.0, 40, None]]
        assert meta["input_top_logprobs"] == [None, [[0.0, 0, None]]]
        assert meta["output_top_logprobs"] == [[[0.0, 0, None]]]
        _, answer = await front.post("/generate", body | {"return_text_in_logprobs": True})
        text = front.state.manager.tokenizer.decode([40])
        assert answer["meta_info"]["output_token_logprobs"] == [[-20.0, 40, text]]


BAD_BODIES: list[tuple[Any, str | None, str]] = [
    (b"", None, "Input data was truncated"),
    (b"{", None, "Input data was truncated"),
    (b"[]", None, "Expected `object`, got `array`"),
    (b'{"text": "\xff"}', None, "can't decode byte 0xff"),
    (b'{"text": "\\ud800 and more text"}', None, "surrogate"),
    (b'{"text": ' + b"[" * 100_000, "text[0]", "Expected `str`, got `array`"),
    (b'{"text": "x", "sampling_params": {"temperature": NaN}}', None, "JSON is malformed"),
    ({}, "text", "Either text or input_ids should be provided"),
    ({"text": "x", "input_ids": [1]}, "text", "Either text or input_ids should be provided"),
    ({"text": ""}, "text", "text cannot be empty"),
    ({"text": []}, "text", "text must hold 1 to 1024 inputs, got 0"),
    ({"text": ["x"] * 1025}, "text", "text must hold 1 to 1024 inputs, got 1025"),
    ({"input_ids": []}, "input_ids", "input_ids cannot be empty"),
    ({"input_ids": [[]]}, "input_ids", "input_ids cannot be empty"),
    ({"input_ids": [1, [2]]}, "input_ids", "mixes ids and lists"),
    ({"input_ids": [VOCAB_SIZE]}, "input_ids", f"the vocabulary has {VOCAB_SIZE} tokens"),
    ({"input_ids": ["1"]}, "input_ids[0]", "Expected `int | array`, got `str`"),
    ({"input_ids": [True]}, "input_ids[0]", "got `bool`"),
    ({"text": "x", "colour": "red"}, "colour", "unknown field `colour`"),
    ({"text": "x", "sampling_params": {"tmp": 1}}, "sampling_params.tmp", "unknown field `tmp`"),
    ({"text": "x", "sampling_params": {"top_k": "5"}}, "sampling_params.top_k", "Expected `int`"),
    ({"text": "x", "sampling_params": {"top_p": 2}}, "sampling_params.top_p", "top_p must be in (0, 1]"),
    ({"text": "x", "image_data": "x.png"}, "image_data", "Expected `null`, got `str`"),
    ({"text": "x", "return_hidden_states": True}, "return_hidden_states", "not implemented"),
    ({"text": "x", "lora_path": 7}, "lora_path", "got `int`"),
    ({"text": "x", "lora_path": ["a"]}, "lora_path", "lora_path is a list, but there is one input"),
    ({"text": ["x", "y"], "lora_path": ["a"]}, "lora_path", "lora_path has 1 entries for 2 inputs"),
    ({"text": ["x", "y"], "rid": ["a", "a"]}, "rid", "Duplicate request ID detected: a"),
    ({"text": ["x"] * 33, "sampling_params": {"n": 128}}, "sampling_params.n", "at most 4096 sequences"),
]


@pytest.mark.parametrize(("body", "param", "message"), BAD_BODIES, ids=range(len(BAD_BODIES)))
@in_loop
async def test_bad_body_is_refused_saying_what_and_where(
    tokenizer_dir: Path, body: Any, param: str | None, message: str
) -> None:
    async with served(tokenizer_dir) as front:
        status, code, where, text = await front.error("/generate", body)
        assert (status, code) == (400, "invalid_request")
        assert message in text
        assert where == param
        assert not front.scheduler.received


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_refusals_keep_their_code(tokenizer_dir: Path, stream: bool) -> None:
    async with served(tokenizer_dir) as front:
        too_long = {"input_ids": [5] * 256, "stream": stream}
        status, code, param, _ = await front.error("/generate", too_long)
        assert (status, code, param) == (400, "context_length_exceeded", "input_ids")
        unknown = {"text": ["x", "y"], "lora_path": [None, "ghost"], "stream": stream}
        status, code, _, message = await front.error("/generate", unknown)
        assert (status, code, message) == (400, "adapter_not_found", "not loaded: ghost")
        front.scheduler.refusal = QueueFullError("the queue is full")
        async with front.client.post("/generate", json={"text": "x", "stream": stream}) as response:
            assert response.status == 503
            assert response.headers["Retry-After"] == "1"
            assert (await response.json())["error"]["type"] == "server_error"
        assert not front.scheduler.running


@in_loop
async def test_body_limits(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        too_large = io.BytesIO(b" " * (MAX_BODY_BYTES + 1))
        async with front.client.post("/generate", data=too_large) as response:
            assert response.status == 413
            assert (await response.json())["error"]["code"] == "request_entity_too_large"
        async with front.client.post(
            "/generate", data=b"x", headers={"Content-Encoding": "gzip"}
        ) as response:
            assert response.status == 400
            assert "compressed" in (await response.json())["error"]["message"]
