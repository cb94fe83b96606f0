"""`/v1/chat/completions` over HTTP with an acted scheduler: what the template sees, shapes, streams, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from manylora.runtime.messages import Submit, unpack_i32
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.generate_call import Prompt, fit_params
from tests.runtime.http_front import HttpFront, served
from tests.tokenizer_manager.fake_scheduler import (
    CACHED_TOKENS,
    CONTEXT_LENGTH,
    VOCAB_SIZE,
    in_loop,
    server_info,
)
from tests.tokenizer_manager.tiny_tokenizer import BOS, BOS_ID, EOS_ID, save_byte_level

PATH = "/v1/chat/completions"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.content == 'never' %}{{ raise_exception('never say never') }}"
    "{% endif %}[{{ m.role }}{{ '/' ~ m.name if m.name }}]{{ m.content }}{% endfor %}[assistant]"
)
HELLO = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE, chat_template=TEMPLATE)


def says(front: HttpFront, text: str) -> None:
    """Let the model say `text`, byte by byte, and end."""
    pieces = front.state.manager.tokenizer.pieces
    script = [*(pieces.index(bytes([byte])) for byte in text.encode()), EOS_ID]
    front.scheduler.answer = lambda _: script


def prompt_of(front: HttpFront) -> str:
    [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
    [request] = submit.requests
    return front.state.manager.tokenizer.decode(unpack_i32(request.input_ids), skip_special_tokens=False)


@in_loop
async def test_one_answer(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        says(front, "Grüße 🙂")
        status, answer = await front.post(PATH, {"model": "base", "messages": HELLO})
        assert status == 200
        assert answer.pop("id").startswith("chatcmpl-")
        assert answer.pop("created") >= front.state.started_at
        num_prompt = answer["usage"]["prompt_tokens"]
        num_new = len("Grüße 🙂".encode()) + 1
        assert answer == {
            "object": "chat.completion",
            "model": "base",
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Grüße 🙂", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                    "matched_stop": EOS_ID,
                }
            ],
            "usage": {
                "prompt_tokens": num_prompt,
                "completion_tokens": num_new,
                "total_tokens": num_prompt + num_new,
                "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
            },
        }


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        (HELLO, "[user]Hello[assistant]"),
        (
            [{"role": "system", "content": "s"}, {"role": "user", "content": "u", "name": "Ann"}],
            "[system]s[user/Ann]u[assistant]",
        ),
        # The template knows no developer.
        ([{"role": "developer", "content": "d"}, *HELLO], "[system]d[user]Hello[assistant]"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            "[user]a\nb[assistant]",
        ),
        # An answer sent back as a client's dump of it.
        (
            [
                *HELLO,
                {
                    "role": "assistant",
                    "content": "Hi",
                    "refusal": None,
                    "annotations": [],
                    "audio": None,
                    "function_call": None,
                    "tool_calls": None,
                },
                *HELLO,
            ],
            "[user]Hello[assistant]Hi[user]Hello[assistant]",
        ),
        ([*HELLO, {"role": "assistant", "content": None}], "[user]Hello[assistant][assistant]"),
    ],
)
@in_loop
async def test_what_the_model_reads(tokenizer_dir: Path, messages: list[Any], prompt: str) -> None:
    async with served(tokenizer_dir) as front:
        status, _ = await front.post(PATH, {"model": "base", "messages": messages})
        assert status == 200
        assert prompt_of(front) == BOS + prompt


@in_loop
async def test_the_developer_of_a_template_that_knows_one(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role in ('developer', 'user') %}<{{ m.role }}>{% endfor %}"
    async with served(save_byte_level(tmp_path, VOCAB_SIZE, chat_template=template)) as front:
        messages = [{"role": "developer", "content": "d"}, *HELLO]
        await front.post(PATH, {"model": "base", "messages": messages})
        assert prompt_of(front) == "<developer><user>"


@in_loop
async def test_no_second_bos(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        await front.post(PATH, {"model": "base", "messages": HELLO})
        [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        assert list(unpack_i32(submit.requests[0].input_ids)).count(BOS_ID) == 1


@in_loop
async def test_limits_of_an_answer(tokenizer_dir: Path) -> None:
    async def limit(**fields: Any) -> int | None:
        front.scheduler.received.clear()
        await front.post(PATH, {"model": "base", "messages": HELLO, **fields})
        [submit] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        return submit.requests[0].params.max_new_tokens

    async with served(tokenizer_dir) as front:
        num_prompt = len(front.state.manager.tokenizer.encode(["[user]Hello[assistant]"])[0])
        assert await limit() == CONTEXT_LENGTH - num_prompt
        assert await limit(max_tokens=5) == 5
        assert await limit(max_completion_tokens=6) == 6
        assert await limit(max_completion_tokens=7, max_tokens=7) == 7


def test_the_pool_keeps_room_for_adapters(tokenizer_dir: Path) -> None:
    """An answer of no given length is not refused for its length where the pool is smaller than the context."""
    small = msgspec.structs.replace(server_info(tokenizer_dir), max_total_tokens=600)
    large = msgspec.structs.replace(small, context_length=4096)
    chat = Prompt("x", SamplingParams(), text="x", default_new_tokens=2**31 - 1)
    assert fit_params(chat, 100, large).max_new_tokens == 250
    assert fit_params(chat, 100, small).max_new_tokens == CONTEXT_LENGTH - 100
    assert fit_params(Prompt("x", SamplingParams(), text="x"), 590, large).max_new_tokens == 128


@pytest.mark.parametrize("tokens_per_step", [1, 4])
@in_loop
async def test_stream(tokenizer_dir: Path, tokens_per_step: int) -> None:
    async with served(tokenizer_dir) as front:
        says(front, "日本 END of it")
        front.scheduler.tokens_per_step = tokens_per_step
        body = {
            "model": "base",
            "messages": HELLO,
            "n": 2,
            "stop": "END",
            "logprobs": True,
            "top_logprobs": 1,
        }
        *events, usage_event, done = await front.events(
            body | {"stream_options": {"include_usage": True}}, PATH
        )
        assert done == "[DONE]"
        _, whole = await front.post(PATH, body)
        assert usage_event["choices"] == []
        assert usage_event["usage"] == whole["usage"]
        assert {(e["object"], e["model"], e["usage"]) for e in events} == {
            ("chat.completion.chunk", "base", None)
        }
        for index in range(2):
            chunks = [c for event in events for c in event["choices"] if c["index"] == index]
            first, *middle, last = chunks
            assert first["delta"] == {"role": "assistant", "content": ""}
            assert (last["delta"], last["finish_reason"], last["matched_stop"]) == ({}, "stop", "END")
            assert [chunk["finish_reason"] for chunk in [first, *middle]] == [None] * (len(chunks) - 1)
            assert all(set(chunk["delta"]) == {"content"} for chunk in middle)
            assert "".join(chunk["delta"]["content"] for chunk in middle) == "日本 "
            content = [token for chunk in middle for token in chunk["logprobs"]["content"]]
            assert content == whole["choices"][index]["logprobs"]["content"]
            assert bytes(byte for token in content for byte in token["bytes"]).decode() == "日本 "


@in_loop
async def test_logprobs(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        says(front, "a")
        a = front.state.manager.tokenizer.pieces.index(b"a")
        body = {"model": "base", "messages": HELLO, "logprobs": True, "top_logprobs": 2}
        _, answer = await front.post(PATH, body)
        assert answer["choices"][0]["logprobs"] == {
            "content": [
                {
                    "token": "a",
                    "logprob": -a / 2,
                    "bytes": [97],
                    "top_logprobs": [
                        {"token": BOS, "logprob": 0.0, "bytes": list(BOS.encode())},
                        {"token": "<|eos|>", "logprob": -0.5, "bytes": list(b"<|eos|>")},
                    ],
                }
            ],
            "refusal": None,
        }
        _, answer = await front.post(PATH, {"model": "base", "messages": HELLO, "logprobs": True})
        assert [token["top_logprobs"] for token in answer["choices"][0]["logprobs"]["content"]] == [[]]


HARMLESS: dict[str, Any] = {
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "function_call": "none",
    "parallel_tool_calls": True,
    "store": False,
    "service_tier": "auto",
    "modalities": ["text"],
    "reasoning_effort": "none",
    "verbosity": "medium",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "in_memory",
    "safety_identifier": "s",
    "user": "u",
    "metadata": {"k": "v"},
    "audio": None,
    "prediction": None,
    "web_search_options": None,
    "moderation": None,
    "response_format": {"type": "text"},
    "logit_bias": None,
    "top_logprobs": 0,
    "chat_template": None,
}


@in_loop
async def test_fields_that_ask_for_nothing(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        status, answer = await front.post(PATH, {"model": "base", "messages": HELLO, **HARMLESS})
        assert status == 200, answer


IMAGE = {"type": "image_url", "image_url": {"url": "http://example.org/x.png"}}
BAD_BODIES: list[tuple[dict[str, Any], str | None, str]] = [
    ({"messages": []}, "messages", "1 to 4096 messages, got 0"),
    ({"messages": HELLO * 4097}, "messages", "got 4097"),
    ({"messages": "Hello"}, "messages", "Expected `array`, got `str`"),
    ({"messages": [{"role": "user"}]}, "messages[0].content", "messages[0] lacks content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "Invalid enum value 'tool'"),
    ({"messages": [{"content": "x"}]}, "messages[0]", "missing required field `role`"),
    ({"messages": [{"role": "user", "content": [IMAGE]}]}, "messages[0].content[0].type", "'image_url'"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        "messages[0].tool_calls[0]",
        "Expected `null`",
    ),
    (
        {"messages": [{"role": "assistant", "tool_calls": [None]}]},
        "messages[0].tool_calls",
        "not implemented",
    ),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "tools is not implemented"),
    ({"tool_choice": "auto"}, "tool_choice", "not implemented"),
    ({"functions": [{"name": "f"}]}, "functions", "not implemented"),
    ({"store": True}, "store", "not implemented"),
    ({"service_tier": "flex"}, "service_tier", "Invalid enum value 'flex'"),
    ({"modalities": ["text", "audio"]}, "modalities[1]", "Invalid enum value 'audio'"),
    ({"reasoning_effort": "high"}, "reasoning_effort", "Invalid enum value 'high'"),
    ({"chat_template": "{{ x }}"}, "chat_template", "Expected `null`"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "Expected `null`"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
    ({"logprobs": True, "top_logprobs": 200}, "top_logprobs", "top_logprobs must be in [0, 128]"),
    ({"logprobs": 5}, "logprobs", "Expected `bool | null`"),
    ({"max_tokens": 1, "max_completion_tokens": 2}, "max_completion_tokens", "two names of one value"),
    ({"max_tokens": 9999}, "max_tokens", "and max_tokens is 9999"),
    ({"max_completion_tokens": 9999}, "max_completion_tokens", "and max_completion_tokens is 9999"),
    ({"n": 10**12}, "n", "n must be in [1, 128]"),
    ({"echo": True}, "echo", "unknown field `echo`"),
    ({"messages": [{"role": "user", "content": "long " * 300}]}, "messages", "leaves no room"),
    ({"messages": [{"role": "user", "content": "long " * 200_000}]}, "messages", "leaves no room"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD_BODIES, ids=range(len(BAD_BODIES)))
@in_loop
async def test_a_bad_body_is_refused_in_the_clients_words(
    tokenizer_dir: Path, fields: dict[str, Any], param: str | None, message: str
) -> None:
    async with served(tokenizer_dir) as front:
        status, _, where, text = await front.error(PATH, {"model": "base", "messages": HELLO, **fields})
        assert status == 400
        assert message in text
        assert where == param
        assert not front.scheduler.received


@in_loop
async def test_a_template_that_refuses(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        body = {"model": "base", "messages": [{"role": "user", "content": "never"}], "stream": True}
        status, code, param, message = await front.error(PATH, body)
        assert (status, code, param) == (400, "chat_template_failed", "messages")
        assert message == "The chat template failed: never say never"


@in_loop
async def test_no_template(tmp_path: Path) -> None:
    async with served(save_byte_level(tmp_path, VOCAB_SIZE)) as front:
        status, code, _, message = await front.error(PATH, {"model": "base", "messages": HELLO})
        assert (status, code) == (400, "no_chat_template")
        assert "--chat-template" in message


@in_loop
async def test_an_empty_rendering(tmp_path: Path) -> None:
    async with served(save_byte_level(tmp_path, VOCAB_SIZE, chat_template="{# nothing #}")) as front:
        status, code, param, message = await front.error(PATH, {"model": "base", "messages": HELLO})
        assert (status, code, param) == (400, "invalid_request", "messages")
        assert message == "messages cannot be empty."


@pytest.mark.parametrize("stream", [False, True])
@in_loop
async def test_an_unknown_model_is_a_404(tokenizer_dir: Path, stream: bool) -> None:
    async with served(tokenizer_dir) as front:
        body = {"model": "ghost", "messages": HELLO, "stream": stream}
        assert (await front.error(PATH, body))[:3] == (404, "model_not_found", "model")
