"""What both OpenAI routes do around a call: which adapter, in whose words an error is told, and the stream's order."""

from __future__ import annotations

import contextlib
import re
import time
import uuid
from collections.abc import AsyncGenerator, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import msgspec

from manylora.runtime.errors import (
    AdapterNotFoundError,
    BadRequestError,
    LoRADisabledError,
    UnknownModelError,
)
from manylora.runtime.http.common import HttpState
from manylora.runtime.http.openai.answer_types import Usage
from manylora.runtime.http.openai.choices import Choice, Delta, Finish, make_usage
from manylora.runtime.http.openai.request_types import OpenAIBody
from manylora.tokenizer_manager.answer import Answer, MetaInfo
from manylora.tokenizer_manager.generate_call import GenerateCall
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager


@dataclass
class OpenAICall:
    """One request on its way. `choices`: `n` for each prompt. `words`: our field names -> the client's."""

    id: str
    model: str
    lora_path: str | None
    call: GenerateCall
    choices: Sequence[Choice]
    n: int
    include_usage: bool
    words: Mapping[str, str]
    created: int = field(default_factory=lambda: int(time.time()))

    async def generate(self, manager: TokenizerManager) -> tuple[list[Delta], Usage]:
        """All choices, whole, in order."""
        with in_words_of_openai(self.lora_path or self.model, self.words):
            answers = await manager.generate(self.call)
        deltas = [choice.advance(answer) for choice, answer in zip(self.choices, answers, strict=True)]
        return deltas, make_usage([answer.meta_info for answer in answers], self.n)

    async def stream(self, manager: TokenizerManager, chunks: Chunks) -> AsyncGenerator[list[Any], None]:
        """The chunks of a stream, as they come."""
        metas: dict[int, MetaInfo] = {}
        with in_words_of_openai(self.lora_path or self.model, self.words):
            async with contextlib.aclosing(manager.stream(self.call)) as batches:
                async for answers in batches:
                    yield [chunk for answer in answers for chunk in self._chunks_of(answer, metas, chunks)]
        if self.include_usage:
            yield [chunks.usage(make_usage([metas[i] for i in range(len(self.choices))], self.n))]

    def _chunks_of(self, answer: Answer, metas: dict[int, MetaInfo], chunks: Chunks) -> Iterator[Any]:
        index = 0 if answer.index is msgspec.UNSET else answer.index
        delta = self.choices[index].advance(answer)
        if index not in metas:
            yield from chunks.begin(index)
        metas[index] = answer.meta_info
        if delta.text or delta.tokens:
            yield chunks.piece(index, delta)
        if delta.finish is not None:
            yield chunks.end(index, delta.finish)


class Chunks(Protocol):
    """How one of the routes writes the chunks of a stream."""

    def begin(self, index: int) -> list[Any]:
        """Before everything else of a choice."""
        ...

    def piece(self, index: int, delta: Delta) -> Any: ...

    def end(self, index: int, finish: Finish) -> Any: ...

    def usage(self, usage: Usage) -> Any: ...


def choose_adapter(state: HttpState, body: OpenAIBody) -> str | None:
    """The adapter that `model` and `lora_path` name together; None is the base model. Whether it is loaded, the
    scheduler will say.

    Raises BadRequestError if they name two, UnknownModelError for an empty name.
    """
    named = _adapter_of_model(state, body.model)
    if named == "" or body.lora_path == "":
        raise unknown_model(body.model if named == "" else "")
    if named is not None and body.lora_path not in (None, named):
        raise BadRequestError(
            f"model names the adapter {named!r} and lora_path {body.lora_path!r}; name one.",
            param="lora_path",
        )
    return named or body.lora_path


def _adapter_of_model(state: HttpState, model: str) -> str | None:
    for base in (state.model_name, state.config.model.model_path):
        if model == base:
            return None
        if model.startswith(f"{base}:"):
            return model[len(base) + 1 :]
    return model


def unknown_model(name: str) -> UnknownModelError:
    return UnknownModelError(
        f"The model {name!r} does not exist; GET /v1/models lists those that do.", param="model"
    )


def new_id(body: OpenAIBody, prefix: str) -> str:
    return body.rid or f"{prefix}-{uuid.uuid4().hex}"


@contextmanager
def in_words_of_openai(model: str, words: Mapping[str, str]) -> Generator[None]:
    """Inside the block an unknown adapter is an unknown model, and errors name the client's fields instead of ours."""
    try:
        yield
    except (AdapterNotFoundError, LoRADisabledError) as error:
        raise unknown_model(model) from error
    except BadRequestError as error:
        # A message begins with the field's name; "text" anywhere else is just a word.
        own_word = re.compile(rf"\A(?:{'|'.join(words)})\b|\b(?:{'|'.join(words.keys() - {'text'})})\b")
        message = own_word.sub(lambda match: words[match[0]], error.message)
        name = (error.param or "").removeprefix("sampling_params.")
        raise type(error)(message, param=words.get(name, name) or None) from error
