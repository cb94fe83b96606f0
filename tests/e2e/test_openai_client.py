"""The official `openai` package against a real server with the demo model and its adapters."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import APIError, AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from transformers import AutoTokenizer

from tests.server import REPOSITORY, Server, running_server

DEMO = REPOSITORY / "demo"
ADAPTERS = ("json", "german", "upper_case")
QUESTION = "List 3 countries and their capitals."
ASKED = [{"role": "user", "content": QUESTION}]
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 64}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    paths = [f"{name}={DEMO / 'adapters' / name}" for name in ADAPTERS]
    flags = ("--served-model-name", "demo", "--lora-paths", *paths, "--max-total-tokens", 8192)
    with running_server(DEMO / "model", *flags, log_dir=tmp_path_factory.mktemp("logs")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str | None, str], str]:
    """(adapter, prompt) -> the greedy answer of transformers and PEFT."""
    answers = json.loads((DEMO / "answers.json").read_text(encoding="utf-8"))
    return {(one["adapter"], one["prompt"]): one["text"] for one in answers}


def chat_ids(messages: list[dict[str, str]]) -> list[int]:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def untyped(messages: list[dict[str, str]]) -> Any:
    return messages


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo", *ADAPTERS]
    assert client.models.retrieve("json").id == "json"
    with pytest.raises(NotFoundError) as caught:
        client.models.retrieve("ghost")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("model", "extra", "adapter"),
    [
        ("demo", {}, None),
        (str(DEMO / "model"), {}, None),
        ("json", {}, "json"),
        ("demo:german", {}, "german"),
        ("demo", {"lora_path": "upper_case"}, "upper_case"),
    ],
)
def test_completions_are_those_of_transformers_and_peft(
    client: OpenAI,
    expected: dict[tuple[str | None, str], str],
    model: str,
    extra: dict[str, Any],
    adapter: str | None,
    stream: bool,
) -> None:
    prompts = [prompt for name, prompt in expected if name == adapter][:4]
    texts = [expected[adapter, prompt] for prompt in prompts]
    asked: dict[str, Any] = {"model": model, "prompt": prompts, "extra_body": extra, **GREEDY}
    if not stream:
        answer = client.completions.create(**asked)
        assert [choice.text for choice in answer.choices] == texts
        assert [choice.finish_reason for choice in answer.choices] == ["stop"] * len(texts)
        return
    streamed = [""] * len(prompts)
    ends: dict[int, str] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert streamed == texts
    assert ends == dict.fromkeys(range(len(texts)), "stop")


@pytest.mark.parametrize("adapter", [None, "json"])
def test_chat_is_the_model_on_the_rendered_prompt(
    server: Server, client: OpenAI, adapter: str | None
) -> None:
    ids = chat_ids(ASKED)
    whole = server.generate(
        input_ids=ids, lora_path=adapter, sampling_params={"temperature": 0, "max_new_tokens": 64}
    )
    answer = client.chat.completions.create(model=adapter or "demo", messages=untyped(ASKED), **GREEDY)
    [choice] = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", whole["text"])
    assert choice.finish_reason == whole["meta_info"]["finish_reason"]["type"]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    assert answer.usage.completion_tokens == len(whole["output_ids"])
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens is not None
    sent_back: Any = [*ASKED, choice.message.model_dump(), {"role": "user", "content": "Hello"}]
    again = client.chat.completions.create(model="demo", messages=sent_back, max_tokens=1)
    assert again.choices[0].finish_reason in ("stop", "length")


def test_chat_stream(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": "json", "messages": untyped(ASKED), **GREEDY}
    whole = client.chat.completions.create(**asked)
    *chunks, last = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(chunks) > 5
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices[0].finish_reason] == ["stop"]
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert last.usage.prompt_tokens_details is not None


def test_stream_helper_of_the_package(client: OpenAI) -> None:
    with client.chat.completions.stream(model="demo", messages=untyped(ASKED), **GREEDY) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert text == final.choices[0].message.content
    assert text


def test_n_and_seed(client: OpenAI) -> None:
    def sample(seed: int) -> list[str | None]:
        answer = client.chat.completions.create(
            model="demo", messages=untyped(ASKED), n=4, seed=seed, temperature=20, max_tokens=12
        )
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        return [choice.message.content for choice in answer.choices]

    first = sample(7)
    assert sample(7) == first
    assert len(set(first)) > 1
    assert sample(-8) != first


def test_stop(client: OpenAI, expected: dict[tuple[str | None, str], str]) -> None:
    answer = client.completions.create(model="demo", prompt=QUESTION, stop=[", Japan"], **GREEDY)
    assert answer.choices[0].text == expected[None, QUESTION].split(", Japan")[0]
    assert answer.choices[0].finish_reason == "stop"
    cut = client.completions.create(model="demo", prompt=QUESTION, temperature=0, max_tokens=3)
    assert cut.choices[0].finish_reason == "length"
    assert cut.usage is not None
    assert cut.usage.completion_tokens == 3


def test_echo_with_logprobs_scores_the_prompt(server: Server, client: OpenAI) -> None:
    native = server.generate(
        text=QUESTION,
        sampling_params={"temperature": 0, "max_new_tokens": 4},
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
    )
    answer = client.completions.create(
        model="demo", prompt=QUESTION, echo=True, logprobs=2, temperature=0, max_tokens=4
    )
    [choice] = answer.choices
    assert choice.text == QUESTION + native["text"]
    meta, logprobs = native["meta_info"], choice.logprobs
    assert logprobs is not None
    scored = [*meta["input_token_logprobs"], *meta["output_token_logprobs"]]
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert logprobs.token_logprobs[1:] == pytest.approx([value for value, _, _ in scored[1:]], abs=1e-4)
    assert logprobs.tokens is not None
    assert logprobs.text_offset is not None
    assert "".join(logprobs.tokens[1:]) == choice.text
    ends = [*logprobs.text_offset[1:], len(choice.text)]
    visible = [choice.text[start:end] for start, end in zip(logprobs.text_offset, ends, strict=True)]
    assert visible == ["", *logprobs.tokens[1:]]


def test_chat_logprobs(client: OpenAI) -> None:
    answer = client.chat.completions.create(
        model="demo", messages=untyped(ASKED), logprobs=True, top_logprobs=3, **GREEDY
    )
    [choice] = answer.choices
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert "".join(token.token for token in choice.logprobs.content) == choice.message.content
    for token in choice.logprobs.content:  # greedy: the drawn one is the best
        assert len(token.top_logprobs) == 3
        assert (token.token, token.logprob) == (token.top_logprobs[0].token, token.top_logprobs[0].logprob)
        assert bytes(token.bytes or []).decode() == token.token


def test_errors_are_typed_by_the_package(client: OpenAI) -> None:
    with pytest.raises(NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=untyped(ASKED))
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(NotFoundError):
        client.completions.create(model="demo", prompt="x", extra_body={"lora_path": "ghost"})
    with pytest.raises(NotFoundError):
        client.completions.create(model="ghost", prompt="x", stream=True)
    with pytest.raises(BadRequestError) as refused:
        client.completions.create(model="demo", prompt="x", temperature=-1)
    assert (refused.value.code, refused.value.param) == ("invalid_request", "temperature")
    with pytest.raises(BadRequestError) as too_long:
        client.chat.completions.create(model="demo", messages=untyped(ASKED), max_completion_tokens=4000)
    assert too_long.value.code == "context_length_exceeded"
    with pytest.raises(BadRequestError) as template:
        client.chat.completions.create(model="demo", messages=[{"role": "system", "content": "x"}])
    assert template.value.code == "chat_template_failed"
    assert "roles are user and assistant" in template.value.message


def test_an_unload_makes_the_model_unknown(server: Server, client: OpenAI) -> None:
    assert server.load("passing", DEMO / "adapters" / "bullets").status == 200
    assert client.completions.create(model="passing", prompt=QUESTION, **GREEDY).choices[0].text
    assert server.unload("passing").status == 200
    with pytest.raises(NotFoundError):
        client.completions.create(model="passing", prompt=QUESTION)


def test_an_abort_breaks_the_stream(server: Server, client: OpenAI) -> None:
    body = {"rid": "long-one", "ignore_eos": True}
    stream = client.completions.create(
        model="demo", prompt="x", max_tokens=1500, stream=True, extra_body=body
    )
    assert next(stream).id == "long-one"
    assert server.post("/abort_request", {"rid": "long-one"}).status == 200
    with pytest.raises(APIError, match="Aborted") as caught:
        list(stream)
    assert caught.value.code == "request_aborted"


def test_leaving_a_stream_frees_everything(server: Server, client: OpenAI) -> None:
    stream = client.chat.completions.create(
        model="json", messages=untyped(ASKED), stream=True, n=2, extra_body={"ignore_eos": True}
    )
    next(stream)
    stream.close()
    server.wait_idle()


def test_async_client(server: Server, expected: dict[tuple[str | None, str], str]) -> None:
    """All adapters at once, streamed and not."""

    async def complete(client: AsyncOpenAI, model: str) -> str:
        answer = await client.completions.create(model=model, prompt=QUESTION, **GREEDY)
        return answer.choices[0].text

    async def streamed(client: AsyncOpenAI, model: str) -> str:
        chunks = await client.completions.create(model=model, prompt=QUESTION, stream=True, **GREEDY)
        return "".join([chunk.choices[0].text async for chunk in chunks])

    async def chat(client: AsyncOpenAI, model: str) -> str | None:
        answer = await client.chat.completions.create(model=model, messages=untyped(ASKED), **GREEDY)
        return answer.choices[0].message.content

    async def main() -> None:
        url = f"http://127.0.0.1:{server.port}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            models = ["demo", *ADAPTERS]
            texts = [expected[None if model == "demo" else model, QUESTION] for model in models]
            calls = [complete(client, model) for model in models] + [
                streamed(client, model) for model in models
            ]
            assert await asyncio.gather(*calls) == texts * 2
            chats = await asyncio.gather(*(chat(client, model) for model in models * 3))
            assert chats[:4] * 3 == chats
            with pytest.raises(NotFoundError):
                await complete(client, "ghost")
            with pytest.raises(BadRequestError):
                await client.chat.completions.create(model="demo", messages=[])

    asyncio.run(main())


def test_a_template_of_the_operators(server: Server, tmp_path: Path) -> None:
    """`--chat-template` overrides the model's own, which need not be there."""
    model = tmp_path / "model"
    shutil.copytree(DEMO / "model", model)
    (model / "chat_template.jinja").unlink()
    template = tmp_path / "mine.jinja"
    template.write_text("{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}")
    flags = ("--chat-template", template, "--max-total-tokens", 4096)
    with running_server(model, *flags, log_dir=tmp_path) as own:
        body = {"model": str(model), "messages": ASKED, **GREEDY}
        reply = own.post("/v1/chat/completions", body)
        assert reply.status == 200, reply
        prompt = server.generate(text=QUESTION, sampling_params={"temperature": 0, "max_new_tokens": 64})
        assert reply.body["choices"][0]["message"]["content"] == prompt["text"]
