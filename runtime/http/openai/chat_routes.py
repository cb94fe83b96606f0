"""`/v1/chat/completions`: messages, rendered by the model's chat template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from aiohttp import web

from manylora.runtime.http.common import STATE, HttpState, json_response, read_body
from manylora.runtime.http.event_stream import stream_events
from manylora.runtime.http.openai.answer_types import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatMessage,
    Usage,
)
from manylora.runtime.http.openai.call import OpenAICall, choose_adapter, new_id
from manylora.runtime.http.openai.choices import Choice, Delta, Finish, chat_logprobs
from manylora.runtime.http.openai.request_types import ChatBody, Message
from manylora.runtime.http.route import Access, Route
from manylora.tokenizer_manager.chat_template import ChatTemplate
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.tokenizer import Tokenizer

_LONGEST = 2**31 - 1  # tokens; the context and the pool decide
_WORDS = {
    "text": "messages",
    "input_ids": "messages",
    "top_logprobs_num": "top_logprobs",
}


async def chat(request: web.Request) -> web.StreamResponse:
    """`n` answers to one conversation."""
    body = await read_body(request, ChatBody)
    body.check()
    state = request.app[STATE]
    call = await _make_call(state, body)
    form = _Form(call, state.manager.tokenizer, bool(body.logprobs))
    if body.stream:
        return await stream_events(request, call.stream(state.manager, form))
    deltas, usage = await call.generate(state.manager)
    return json_response(form.whole(deltas, usage))


async def _make_call(state: HttpState, body: ChatBody) -> OpenAICall:
    """Raises BadRequestError or UnknownModelError."""
    params = body.to_params(
        body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    )
    adapter = choose_adapter(state, body)
    call_id = new_id(body, "chatcmpl")
    prompt = Prompt(
        call_id,
        params,
        text=await state.chat.render([_turn(message, state.chat) for message in body.messages]),
        lora_name=adapter,
        return_logprob=bool(body.logprobs),
        top_logprobs_num=body.top_logprobs or 0,
        new_logprobs_only=bool(body.stream),
        default_new_tokens=_LONGEST,
    )
    tokenizer = state.manager.tokenizer
    skip = params.skip_special_tokens
    limit = "max_tokens" if body.max_completion_tokens is None else "max_completion_tokens"
    return OpenAICall(
        call_id,
        body.model,
        body.lora_path,
        GenerateCall([prompt], add_special_tokens=False),
        [Choice(tokenizer, skip_special_tokens=skip) for _ in range(params.n)],
        params.n,
        bool(body.stream_options and body.stream_options.include_usage),
        {**_WORDS, **body.words, "max_new_tokens": limit},
    )


def _turn(message: Message, template: ChatTemplate) -> dict[str, Any]:
    """A message as templates know it. To one that has no developers they are the system: it may drop a role it does not
    know without a word.
    """
    role = message.role
    if role == "developer" and "developer" not in (template.text or ""):
        role = "system"
    turn = {"role": role, "content": message.text()}
    return turn if message.name is None else {**turn, "name": message.name}


@dataclass(frozen=True)
class _Form:
    """Chunks and the whole answer, in this route's shape."""

    call: OpenAICall
    tokenizer: Tokenizer
    with_logprobs: bool

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> ChatCompletion:
        choices: list[ChatChoice] = []
        for index, delta in enumerate(deltas):
            assert delta.finish is not None
            logprobs = chat_logprobs(delta.tokens, self.tokenizer) if self.with_logprobs else None
            message = ChatMessage("assistant", delta.text)
            choices.append(ChatChoice(index, message, logprobs, delta.finish.reason, delta.finish.matched))
        call = self.call
        return ChatCompletion(
            id=call.id,
            object="chat.completion",
            created=call.created,
            model=call.model,
            choices=choices,
            usage=usage,
        )

    def begin(self, index: int) -> list[Any]:
        return [self._chunk([ChatChunkChoice(index, ChatDelta("assistant", ""))])]

    def piece(self, index: int, delta: Delta) -> ChatChunk:
        logprobs = chat_logprobs(delta.tokens, self.tokenizer) if self.with_logprobs else None
        return self._chunk([ChatChunkChoice(index, ChatDelta(content=delta.text), logprobs)])

    def end(self, index: int, finish: Finish) -> ChatChunk:
        return self._chunk([ChatChunkChoice(index, ChatDelta(), None, finish.reason, finish.matched)])

    def usage(self, usage: Usage) -> ChatChunk:
        return self._chunk([], usage)

    def _chunk(self, choices: list[ChatChunkChoice], usage: Usage | None = None) -> ChatChunk:
        """In a stream that will tell its usage, every chunk before has it null."""
        call = self.call
        return ChatChunk(
            id=call.id,
            object="chat.completion.chunk",
            created=call.created,
            model=call.model,
            choices=choices,
            usage=usage if call.include_usage else msgspec.UNSET,
        )


ROUTES = (
    Route(
        "POST",
        "/v1/chat/completions",
        chat,
        Access.USER,
        "Answer a chat, as OpenAI's API.",
        body=ChatBody,
        answer=ChatCompletion,
        event=ChatChunk,
        errors=(404, 410, 499),
    ),
)
