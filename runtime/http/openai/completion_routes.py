"""`/v1/completions`: prompts as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import msgspec
from aiohttp import web

from manylora.runtime.api_types import MAX_SEQUENCES
from manylora.runtime.bounds import MAX_INPUTS
from manylora.runtime.errors import BadRequestError
from manylora.runtime.http.common import STATE, HttpState, json_response, read_body
from manylora.runtime.http.event_stream import stream_events
from manylora.runtime.http.openai.answer_types import Completion, CompletionChoice, Usage
from manylora.runtime.http.openai.call import OpenAICall, choose_adapter, new_id
from manylora.runtime.http.openai.choices import Choice, Delta, Finish, completion_logprobs
from manylora.runtime.http.openai.request_types import CompletionBody
from manylora.runtime.http.route import Access, Route
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt
from manylora.tokenizer_manager.tokenizer import Tokenizer

DEFAULT_MAX_TOKENS = 16  # as in OpenAI's documents
_WORDS = {
    "text": "prompt",
    "input_ids": "prompt",
    "max_new_tokens": "max_tokens",
    "top_logprobs_num": "logprobs",
}

Input = str | list[int]


async def complete(request: web.Request) -> web.StreamResponse:
    """One choice for each prompt and sample, prompt after prompt."""
    body = await read_body(request, CompletionBody)
    state = request.app[STATE]
    call = _make_call(state, body)
    form = _Form(call, state.manager.tokenizer, body.logprobs is not None)
    if body.stream:
        return await stream_events(request, call.stream(state.manager, form))
    deltas, usage = await call.generate(state.manager)
    return json_response(form.whole(deltas, usage))


def _make_call(state: HttpState, body: CompletionBody) -> OpenAICall:
    """Raises BadRequestError or UnknownModelError."""
    _check(body)
    inputs = _inputs(body.prompt)
    params = body.to_params(body.max_tokens)
    if len(inputs) * params.n > MAX_SEQUENCES:
        raise BadRequestError(f"a call has at most {MAX_SEQUENCES} sequences.", param="n")
    adapter = choose_adapter(state, body)
    call_id = new_id(body, "cmpl")
    with_logprobs = body.logprobs is not None
    prompts = [
        Prompt(
            call_id if len(inputs) == 1 else f"{call_id}_{index}",
            params,
            text=one if isinstance(one, str) else None,
            input_ids=None if isinstance(one, str) else one,
            lora_name=adapter,
            return_logprob=with_logprobs,
            top_logprobs_num=body.logprobs or 0,
            logprob_start_len=0 if body.echo and with_logprobs else -1,
            new_logprobs_only=bool(body.stream),
            default_new_tokens=max(DEFAULT_MAX_TOKENS, params.min_new_tokens),
        )
        for index, one in enumerate(inputs)
    ]
    tokenizer, skips = state.manager.tokenizer, params.skip_special_tokens
    context = state.manager.info.context_length
    echoes = [_echo(one, tokenizer, context, skips) if body.echo else "" for one in inputs]
    choices = [
        Choice(tokenizer, skip_special_tokens=skips, echo=echo) for echo in echoes for _ in range(params.n)
    ]
    usage_wanted = bool(body.stream_options and body.stream_options.include_usage)
    return OpenAICall(
        call_id,
        body.model,
        body.lora_path,
        GenerateCall(prompts, as_list=len(inputs) > 1),
        choices,
        params.n,
        usage_wanted,
        {**_WORDS, **body.words},
    )


def _check(body: CompletionBody) -> None:
    body.check_common()
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise BadRequestError("best_of is implemented only where it equals n.", param="best_of")


def _inputs(prompt: str | list[str | int | list[int]]) -> Sequence[Input]:
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise BadRequestError("prompt cannot be empty.", param="prompt")
    kinds = {type(one) for one in prompt}
    if len(kinds) > 1:
        raise BadRequestError("prompt mixes texts, token ids and lists of ids.", param="prompt")
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if len(prompt) > MAX_INPUTS:
        raise BadRequestError(
            f"prompt must hold 1 to {MAX_INPUTS} inputs, got {len(prompt)}.", param="prompt"
        )
    return cast("list[Input]", prompt)


def _echo(one: Input, tokenizer: Tokenizer, context_length: int, skip_special_tokens: bool) -> str:
    """Ids that no tokenizer has, and more of them than the context holds, are refused later, by name."""
    if isinstance(one, str):
        return one
    if len(one) > context_length:  # not to be decoded first, which would take its time
        return ""
    return tokenizer.decode((max(token, 0) for token in one), skip_special_tokens=skip_special_tokens)


@dataclass(frozen=True)
class _Form:
    """Chunks and the whole answer, in this route's shape."""

    call: OpenAICall
    tokenizer: Tokenizer
    with_logprobs: bool

    def whole(self, deltas: Sequence[Delta], usage: Usage) -> Completion:
        choices = [self._choice(index, delta, delta.finish) for index, delta in enumerate(deltas)]
        return self._completion(choices, usage)

    def begin(self, index: int) -> list[Any]:
        return []

    def piece(self, index: int, delta: Delta) -> Completion:
        return self._chunk([self._choice(index, delta, None)])

    def end(self, index: int, finish: Finish) -> Completion:
        return self._chunk([CompletionChoice(index, "", None, finish.reason, finish.matched)])

    def usage(self, usage: Usage) -> Completion:
        return self._chunk([], usage)

    def _choice(self, index: int, delta: Delta, finish: Finish | None) -> CompletionChoice:
        logprobs = completion_logprobs(delta.tokens, self.tokenizer) if self.with_logprobs else None
        reason, matched = finish or (None, None)
        return CompletionChoice(index, delta.text, logprobs, reason, matched)

    def _chunk(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        """In a stream that will tell its usage, every chunk before has it null."""
        return self._completion(choices, usage if self.call.include_usage else msgspec.UNSET)

    def _completion(
        self, choices: list[CompletionChoice], usage: Usage | msgspec.UnsetType | None
    ) -> Completion:
        call = self.call
        return Completion(
            id=call.id,
            object="text_completion",
            created=call.created,
            model=call.model,
            choices=choices,
            usage=usage,
        )


ROUTES = (
    Route(
        "POST",
        "/v1/completions",
        complete,
        Access.USER,
        "Complete prompts, as OpenAI's API.",
        body=CompletionBody,
        answer=Completion,
        event=Completion,
        errors=(404, 410, 499),
    ),
)
