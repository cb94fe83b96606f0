"""`/v1/completions` over HTTP with an acted scheduler: shapes, tokens and offsets, streams, refusals in the client's words."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest

from manylora.runtime.errors import NonFiniteLogitsError, QueueFullError
from manylora.runtime.http.openai.request_types import CompletionBody
from manylora.runtime.messages import Submit, unpack_i32
from manylora.runtime.sampling_params import SamplingParams
from tests.runtime.http_front import HttpFront, served
from tests.tokenizer_manager.fake_scheduler import CACHED_TOKENS, VOCAB_SIZE, in_loop, until
from tests.tokenizer_manager.tiny_tokenizer import BOS, EOS_ID, save_byte_level

PATH = "/v1/completions"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


def byte_tokens(front: HttpFront, text: str) -> list[int]:
    """One token per byte, so that characters come in parts."""
    return [front.state.manager.tokenizer.pieces.index(bytes([byte])) for byte in text.encode()]


def says(front: HttpFront, text: str) -> None:
    """Let the model say `text`, byte by byte, and end."""
    script = [*byte_tokens(front, text), EOS_ID]
    front.scheduler.answer = lambda _: script


def submitted(front: HttpFront) -> list[SamplingParams]:
    [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
    return [request.params for request in submit.requests]


def joined(events: list[Any], index: int = 0) -> dict[str, Any]:
    """The choice `index` of a stream, put together; its last chunk must be the only one with a finish reason."""
    chunks = [c for event in events for c in event["choices"] if c["index"] == index]
    assert [chunk["finish_reason"] for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    columns = [chunk["logprobs"] for chunk in chunks if chunk["logprobs"]]
    logprobs: dict[str, list[Any]] | None = None
    for columns in filter(None, (chunk["logprobs"] for chunk in chunks)):
        logprobs = {name: [*(logprobs or {}).get(name, []), *columns[name]] for name in columns}
    text = "".join(chunk["text"] for chunk in chunks)
    return {**chunks[-1], "text": text, "logprobs": logprobs}


@in_loop
async def test_one_prompt(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        status, answer = await front.post(PATH, {"model": "base", "prompt": "Paris"})
        assert status == 200
        assert answer.pop("id").startswith("cmpl-")
        assert answer.pop("created") >= front.state.started_at
        [choice] = answer.pop("choices")
        text = choice.pop("text")
        assert text.startswith("ParisParis")
        assert choice == {"index": 0, "logprobs": None, "finish_reason": "length", "matched_stop": None}
        num_prompt = len(front.state.manager.tokenizer.encode(["Paris"])[0])
        assert answer == {
            "object": "text_completion",
            "model": "base",
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": 16,
                "total_tokens": num_prompt + 16,
                "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
            },
        }


@pytest.mark.parametrize(
    ("prompt", "n", "texts"),
    [
        ("ab", 2, ["ab", "ab"]),
        (["a", "b"], 1, ["a", "b"]),
        (["a", "b"], 2, ["a", "a", "b", "b"]),
        (["a"], None, ["a"]),
        ("ids", 1, ["xy"]),
        ("lists of ids", 2, ["x", "x", "y", "y"]),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_choices_come_prompt_after_prompt(
    tokenizer_dir: Path, prompt: Any, n: int | None, texts: list[str], stream: bool
) -> None:
    async with served(tokenizer_dir) as front:
        x, y = byte_tokens(front, "xy")
        given = {"ids": [0, x, y], "lists of ids": [[0, x], [0, y]]}.get(str(prompt), prompt)
        length = len(texts[0])
        body = {"model": "base", "prompt": given, "n": n, "max_tokens": length}
        if stream:
            *events, usage_event, done = await front.events(
                body | {"stream_options": {"include_usage": True}}, PATH
            )
            assert done == "[DONE]"
            assert all(event["usage"] is None for event in events)
            assert usage_event["choices"] == []
            assert len({event["id"] for event in [*events, usage_event]}) == 1
            choices, usage = [joined(events, i) for i in range(len(texts))], usage_event["usage"]
        else:
            _, answer = await front.post(PATH, body)
            choices, usage = answer["choices"], answer["usage"]
        assert [choice["index"] for choice in choices] == list(range(len(texts)))
        assert [choice["text"] for choice in choices] == texts
        num_prompts = len(texts) // (n or 1)
        assert usage["prompt_tokens"] == num_prompts * (1 + length)  # BOS
        assert usage["completion_tokens"] == len(texts) * length
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens_details"]["cached_tokens"] == num_prompts * CACHED_TOKENS


@pytest.mark.parametrize("tokens_per_step", [1, 2, 3, 50])
@pytest.mark.parametrize(
    ("text", "stop", "expected", "finish"),
    [
        ("naïve 日本🙂.", None, "naïve 日本🙂.", ("stop", EOS_ID)),
        ("abc END def", "END", "abc ", ("stop", "END")),
        ("abc ENE def", ["ENE d", "END"], "abc ", ("stop", "ENE d")),
        ("日本の首都", "の", "日本", ("stop", "の")),
        ("END", "END", "", ("stop", "END")),
        ("EN", "END", "EN", ("stop", EOS_ID)),
    ],
)
@in_loop
async def test_stream_and_whole_say_the_same(
    tokenizer_dir: Path, text: str, stop: Any, expected: str, finish: tuple[Any, Any], tokens_per_step: int
) -> None:
    """No half character, nothing that a stop string takes back, and logprobs of just the tokens in the text."""
    async with served(tokenizer_dir) as front:
        says(front, text)
        front.scheduler.tokens_per_step = tokens_per_step
        body = {"model": "base", "prompt": "x", "max_tokens": 60, "stop": stop, "logprobs": 2}
        *events, done = await front.events(body, PATH)
        assert done == "[DONE]"
        assert all("usage" not in event for event in events)
        assert not any("\ufffd" in choice["text"] for event in events for choice in event["choices"])
        streamed = joined(events)
        _, answer = await front.post(PATH, body)
        [whole] = answer["choices"]
        assert whole["text"] == expected
        assert (whole["finish_reason"], whole["matched_stop"]) == finish
        if not whole["logprobs"]["tokens"]:
            assert streamed.pop("logprobs") is None
            del whole["logprobs"]
        assert streamed == whole
        tokens = byte_tokens(front, expected)
        columns = whole.get("logprobs") or {"tokens": [], "token_logprobs": [], "text_offset": []}
        assert len(columns["tokens"]) == len(tokens)
        assert columns["token_logprobs"] == [-token / 2 for token in tokens]
        offsets = [len(expected.encode()[:i].decode(errors="ignore")) for i in range(len(tokens))]
        assert columns["text_offset"] == offsets


@in_loop
async def test_legacy_logprobs(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        says(front, "aé")
        pieces = front.state.manager.tokenizer.pieces
        a, e1, e2 = byte_tokens(front, "aé")
        body = {"model": "base", "prompt": "x", "logprobs": 1}
        _, answer = await front.post(PATH, body)
        assert answer["choices"][0]["logprobs"] == {
            "tokens": ["a", "bytes:\\xc3", "bytes:\\xa9"],
            "token_logprobs": [-a / 2, -e1 / 2, -e2 / 2],
            "top_logprobs": [
                {BOS: 0.0, "a": -a / 2},
                {BOS: 0.0, "bytes:\\xc3": -e1 / 2},
                {BOS: 0.0, "bytes:\\xa9": -e2 / 2},
            ],
            "text_offset": [0, 1, 1],
        }
        assert pieces[0].decode() == BOS
        _, answer = await front.post(PATH, body | {"logprobs": 0})
        assert answer["choices"][0]["logprobs"]["top_logprobs"][0] == {"a": -a / 2}


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_echo(tokenizer_dir: Path, stream: bool) -> None:
    async def choice(**fields: Any) -> Any:
        body = {"model": "base", "prompt": "né", "echo": True, **fields}
        if stream:
            *events, _ = await front.events(body, PATH)
            return joined(events)
        return (await front.post(PATH, body))[1]["choices"][0]

    async with served(tokenizer_dir) as front:
        says(front, "日x")
        assert (await choice())["text"] == "né日x"
        [ids] = front.state.manager.tokenizer.encode(["né"])
        assert (await choice(prompt=ids))["text"] == "né日x"
        both = await choice(prompt=["né", "né"])
        assert both["text"] == "né日x"
        answer = await choice(logprobs=0)
        assert answer["text"] == "né日x"
        columns = answer["logprobs"]
        assert len(columns["tokens"]) == len(ids) + 4
        assert columns["tokens"][0] == BOS
        assert (columns["token_logprobs"][0], columns["top_logprobs"][0]) == (None, None)
        assert columns["token_logprobs"][1 : len(ids)] == [-token / 2 for token in ids[1:]]
        assert columns["text_offset"][:2] == [0, 0]
        assert columns["text_offset"][len(ids) :] == [2, 2, 2, 3]
        scored = await choice(max_tokens=0, logprobs=0)
        assert (scored["text"], scored["finish_reason"]) == ("né", "length")
        assert len(scored["logprobs"]["tokens"]) == len(ids)


@in_loop
async def test_every_parameter_reaches_the_scheduler(tokenizer_dir: Path) -> None:
    given: dict[str, Any] = {
        "temperature": 0.7,
        "top_p": 0.9,
        "n": 2,
        "stop": ["never"],
        "seed": 11,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "ignore_eos": True,
        "stop_token_ids": [9],
        "skip_special_tokens": False,
    }
    async with served(tokenizer_dir) as front:
        body = {"model": "base", "prompt": "x", **given, "max_tokens": 3, "min_tokens": 1, "best_of": 2}
        status, _ = await front.post(
            PATH, body | {"logit_bias": {"7": 5}, "user": "me", "metadata": {"a": "b"}}
        )
        assert status == 200
        [params] = submitted(front)
        assert {name: getattr(params, name) for name in given} == given
        assert (params.max_new_tokens, params.min_new_tokens, params.logit_bias) == (3, 1, {7: 5.0})


@pytest.mark.parametrize(
    ("fields", "name", "value"),
    [
        ({"regex": "a+"}, "regex", "a+"),
        ({"ebnf": "root ::= 'a'"}, "ebnf", "root ::= 'a'"),
        ({"json_schema": "{}"}, "json_schema", "{}"),
        ({"response_format": {"type": "text"}}, "json_schema", None),
        ({"response_format": {"type": "json_object"}}, "json_schema", '{"type": "object"}'),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "array", "b": 1, "a": 2}, "strict": True},
                }
            },
            "json_schema",
            '{"type":"array","b":1,"a":2}',
        ),
        ({"seed": -1}, "seed", 2**63 - 1),
        ({"top_k": 0}, "top_k", -1),
        ({"temperature": None, "stop": None, "suffix": None, "logit_bias": {}}, "temperature", 1.0),
    ],
)
def test_fields_become_sampling_parameters(fields: dict[str, Any], name: str, value: Any) -> None:
    body = msgspec.convert({"model": "base", "prompt": "x", **fields}, CompletionBody)
    assert getattr(body.to_params(None), name) == value


OTHERS = {"response_format": {"type": "json_object"}, "regex": "a"}
BAD_BODIES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"prompt": None}, "prompt", "Expected `str | array`, got `null`"),
    ({"prompt": ""}, "prompt", "prompt cannot be empty"),
    ({"prompt": []}, "prompt", "prompt cannot be empty"),
    ({"prompt": [[]]}, "prompt", "prompt cannot be empty"),
    ({"prompt": ["a", 1]}, "prompt", "prompt mixes"),
    ({"prompt": ["x"] * 1025}, "prompt", "1 to 1024 inputs"),
    ({"prompt": ["x"] * 33, "n": 128}, "n", "at most 4096 sequences"),
    ({"prompt": [VOCAB_SIZE]}, "prompt", f"prompt holds {VOCAB_SIZE}"),
    ({"prompt": [-1], "echo": True}, "prompt", "prompt holds -1"),
    ({"prompt": [5] * 256}, "prompt", "leaves no room"),
    ({"prompt": "x", "max_tokens": 1000}, "max_tokens", "and max_tokens is 1000"),
    ({"max_tokens": -1}, "max_tokens", "max_tokens must be in"),
    ({"max_tokens": 2, "min_tokens": 3}, "min_tokens", "min_tokens must be in [0, max_tokens(2)]"),
    ({"temperature": -1}, "temperature", "temperature must be"),
    ({"temperature": "hot"}, "temperature", "Expected `float | null`"),
    ({"n": 0}, "n", "n must be in [1, 128]"),
    ({"logprobs": 1000}, "logprobs", "logprobs must be in [0, 128]"),
    ({"logprobs": True}, "logprobs", "got `bool`"),
    ({"best_of": 2}, "best_of", "only where it equals n"),
    ({"suffix": "end"}, "suffix", "Invalid enum value 'end'"),
    ({"seed": 2**63}, "seed", "seed must be in"),
    ({"stop": [""]}, "stop", "none of them empty"),
    ({"stop_token_ids": [VOCAB_SIZE]}, "stop_token_ids", "the vocabulary has"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "Expected `int`"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not",
    ),
    ({"response_format": {"type": "yaml"}}, "response_format.type", "Invalid enum value 'yaml'"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs it"),
    (OTHERS, "response_format", "cannot be combined"),
    ({"lora_path": ["a"]}, "lora_path", "Expected `str | null`"),
    ({"colour": "red"}, "colour", "unknown field `colour`"),
    ({"model": None}, "model", "Expected `str`"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_BODIES, ids=range(len(BAD_BODIES)))
@in_loop
async def test_a_bad_body_is_refused_in_the_clients_words(
    tokenizer_dir: Path, fields: dict[str, Any], param: str | None, message: str
) -> None:
    async with served(tokenizer_dir) as front:
        status, _, where, text = await front.error(PATH, {"model": "base", "prompt": "x", **fields})
        assert status == 400
        assert message in text
        assert where == param
        assert not front.scheduler.received


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({"model": "base"}, None),
        ({"model": "org/base"}, None),
        ({"model": "json"}, "json"),
        ({"model": "base:json"}, "json"),
        ({"model": "org/base:json"}, "json"),
        ({"model": "base", "lora_path": "json"}, "json"),
        ({"model": "json", "lora_path": "json"}, "json"),
        ({"model": "base:json", "lora_path": "json"}, "json"),
        ({"model": "base", "lora_path": None}, None),
    ],
)
@in_loop
async def test_model_chooses_the_adapter(
    tokenizer_dir: Path, fields: dict[str, Any], adapter: str | None
) -> None:
    async with served(tokenizer_dir) as front:
        await front.post("/load_lora_adapter", {"lora_name": "json", "lora_path": "a"})
        status, answer = await front.post(PATH, {"prompt": "x", **fields})
        assert (status, answer["model"]) == (200, fields["model"])
        [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        assert [request.lora_name for request in submit.requests] == [adapter]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"model": "gpt-4o"}, "gpt-4o"),
        ({"model": "base:ghost"}, "base:ghost"),
        ({"model": "other:json"}, "other:json"),
        ({"model": "base:"}, "base:"),
        ({"model": ""}, ""),
        ({"model": "base", "lora_path": "ghost"}, "ghost"),
        ({"model": "base", "lora_path": ""}, ""),
    ],
)
@in_loop
async def test_an_unknown_model_is_a_404(
    tokenizer_dir: Path, fields: dict[str, Any], name: str, stream: bool
) -> None:
    async with served(tokenizer_dir) as front:
        await front.post("/load_lora_adapter", {"lora_name": "json", "lora_path": "a"})
        status, code, param, message = await front.error(PATH, {"prompt": "x", "stream": stream, **fields})
        assert (status, code, param) == (404, "model_not_found", "model")
        assert message.startswith(f"The model {name!r} does not exist")


@in_loop
async def test_two_adapters_at_once_are_refused(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        status, code, param, _ = await front.error(PATH, {"model": "a", "prompt": "x", "lora_path": "b"})
        assert (status, code, param) == (400, "invalid_request", "lora_path")


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_an_abort_is_an_error_not_a_stop(tokenizer_dir: Path, stream: bool) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.held = True
        body = {"model": "base", "prompt": ["x", "y"], "rid": "mine", "max_tokens": 200, "stream": stream}
        asking = asyncio.create_task(front.post(PATH, body))
        await until(lambda: len(front.scheduler.running) == 2)
        if stream:
            front.scheduler.step()
        await front.post("/abort_request", {"rid": "mine_"})
        status, answer = await asking
        if stream and status == 200:
            assert '"code":"request_aborted"' in answer
            assert answer.endswith("data: [DONE]\n\n")
            assert '"finish_reason":"' not in answer
        else:
            assert (status, answer["error"]["code"]) == (499, "request_aborted")


@in_loop
async def test_errors_keep_their_place(tokenizer_dir: Path) -> None:
    body = {"model": "base", "prompt": "x"}
    async with served(tokenizer_dir) as front:
        front.scheduler.refusal = QueueFullError("the queue is full")
        assert (await front.error(PATH, body | {"stream": True}))[:2] == (503, "queue_full")
        front.scheduler.refusal = None
        front.scheduler.failing_token = (3, NonFiniteLogitsError("the logits are not finite"))
        assert (await front.error(PATH, body))[:2] == (500, "non_finite_logits")
        *events, error, done = await front.events(body, PATH)
        assert done == "[DONE]"
        assert error["error"]["code"] == "non_finite_logits"
        assert all(choice["finish_reason"] is None for event in events for choice in event["choices"])


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_a_client_that_leaves_aborts_its_sequences(tokenizer_dir: Path, stream: bool) -> None:
    async with served(tokenizer_dir) as front:
        front.scheduler.held = not stream
        body = {"model": "base", "prompt": ["x", "y"], "n": 2, "max_tokens": 240, "stream": stream}
        asking = asyncio.create_task(front.post(PATH, body))
        await until(lambda: len(front.scheduler.running) == 4)
        asking.cancel()
        await until(lambda: sorted(front.scheduler.aborted) == [1, 2, 3, 4])


@in_loop
async def test_one_card(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        await front.post("/load_lora_adapter", {"lora_name": "org/json", "lora_path": "a"})
        _, cards = await front.get("/v1/models")
        assert await front.get("/v1/models/base") == (200, cards["data"][0])
        assert await front.get("/v1/models/org/json") == (200, cards["data"][1])
        assert await front.get("/v1/models/org%2Fjson") == (200, cards["data"][1])
        status, answer = await front.get("/v1/models/ghost")
        assert (status, answer["error"]["code"]) == (404, "model_not_found")


@in_loop
async def test_prompts_get_their_bos(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        await front.post(PATH, {"model": "base", "prompt": "Paris"})
        [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        ids = list(unpack_i32(submit.requests[0].input_ids))
        assert ids == front.state.manager.tokenizer.encode(["Paris"])[0]
        assert ids.count(0) == 1


@in_loop
async def test_ids_beyond_the_context_are_refused_before_they_are_decoded(
    tokenizer_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with served(tokenizer_dir) as front:
        monkeypatch.setattr(front.state.manager.tokenizer, "decode", lambda *_, **__: pytest.fail("decoded"))
        body = {"model": "base", "prompt": [1] * 200_000, "echo": True, "n": 8}
        status, answer = await front.post(PATH, body)
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


@in_loop
async def test_more_tokens_may_be_wanted_than_a_completion_has_by_itself(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        says(front, "Paris")
        status, _ = await front.post(PATH, {"model": "base", "prompt": "x", "min_tokens": 150})
        assert status == 200
        [params] = submitted(front)
        assert (params.min_new_tokens, params.max_new_tokens) == (150, 150)
