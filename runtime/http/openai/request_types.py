"""The bodies of the OpenAI routes: every field of OpenAI's documents that concerns text, and the usual extras.

A field that is not implemented takes only the value that asks for nothing; null always means "not given".
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec

from manylora.runtime.bounds import (
    MAX_MESSAGES,
    MAX_N,
    NUM_INTS,
    NUM_SEEDS,
    MinP,
    Penalty,
    RepetitionPenalty,
    RequestId,
    Samples,
    StopString,
    StopStrings,
    StopTokenIds,
    Temperature,
    Text,
    TokenCount,
    TokenId,
    TokenIds,
    TopLogprobs,
    TopP,
    published,
)
from manylora.runtime.errors import BadRequestError
from manylora.runtime.sampling_params import SamplingParams

_ANY_OBJECT = '{"type": "object"}'


class StreamOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`include_usage`: one more chunk at the end, with the usage and no choices."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class JsonSchema(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`name`, `description` and `strict` change nothing: an answer always keeps to the schema."""

    name: str
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def to_schema(self) -> str | None:
        """The JSON schema an answer must match, as JSON; None for any text."""
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise BadRequestError(
                'response_format.json_schema belongs to the type "json_schema", and that needs it.',
                param="response_format.json_schema",
            )
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema is None:
            return _ANY_OBJECT
        try:
            return msgspec.json.encode(self.json_schema.schema).decode()
        except RecursionError as error:
            raise BadRequestError(
                "response_format.json_schema.schema is nested too deeply.",
                param="response_format.json_schema.schema",
            ) from error


class OpenAIBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What both routes take.

    `model`: the base model's name or path, an adapter's name, or `base:adapter`. `lora_path`: the *name* of an adapter,
    where `model` is the base model. `rid`: for /abort_request; the answer's id. `user`, `metadata`: for the client's own use.
    """

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Samples | None = None
    temperature: Temperature | None = None
    top_p: TopP | None = None
    max_tokens: TokenCount | None = None
    stop: StopString | StopStrings | None = None
    seed: Annotated[int, published(minimum=-NUM_SEEDS, maximum=NUM_SEEDS - 1)] | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: dict[int, float] | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    # Beyond OpenAI's, named as other servers name them.
    top_k: Annotated[int, published(minimum=-1, maximum=NUM_INTS - 1)] | None = None
    min_p: MinP | None = None
    repetition_penalty: RepetitionPenalty | None = None
    min_tokens: TokenCount | None = None
    ignore_eos: bool | None = None
    stop_token_ids: StopTokenIds | None = None
    skip_special_tokens: bool | None = None
    lora_path: str | None = None
    rid: RequestId | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: str | None = None

    @property
    def words(self) -> dict[str, str]:
        """Our names of fields -> those the client used, as far as they differ on both routes."""
        words = {"min_new_tokens": "min_tokens", "lora_path": "model"}
        return {**words, "json_schema": "response_format"} if self.response_format else words

    def check_common(self) -> None:
        """Raise BadRequestError where fields contradict each other or ask for what is not implemented."""
        if self.stream_options is not None:
            if not self.stream:
                raise BadRequestError("stream_options needs stream: true.", param="stream_options")
            if self.stream_options.include_obfuscation:
                raise BadRequestError(
                    "stream_options.include_obfuscation is not implemented.",
                    param="stream_options.include_obfuscation",
                )
        if self.n is not None and not 1 <= self.n <= MAX_N:  # before anything is made n times
            raise BadRequestError(f"n must be in [1, {MAX_N}], got {self.n}.", param="n")
        if self.seed is not None and not -NUM_SEEDS <= self.seed < NUM_SEEDS:
            raise BadRequestError(f"seed must be in [-2^63, 2^63), got {self.seed}.", param="seed")

    def to_params(self, max_new_tokens: int | None) -> SamplingParams:
        """The sampling parameters this body asks for. Raises BadRequestError."""
        schema = self.response_format.to_schema() if self.response_format else None
        if schema is not None and (self.json_schema, self.regex, self.ebnf) != (None, None, None):
            raise BadRequestError(
                "response_format cannot be combined with json_schema, regex or ebnf.", param="response_format"
            )
        given: dict[str, Any] = {
            "n": self.n,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "max_new_tokens": max_new_tokens,
            "stop": self.stop,
            "seed": None if self.seed is None else self.seed % NUM_SEEDS,  # ours are not negative
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
            "logit_bias": self.logit_bias or None,
            "top_k": -1 if self.top_k == 0 else self.top_k,  # 0 turns it off elsewhere
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "min_new_tokens": self.min_tokens,
            "ignore_eos": self.ignore_eos,
            "stop_token_ids": self.stop_token_ids,
            "skip_special_tokens": self.skip_special_tokens,
            "json_schema": schema or self.json_schema,
            "regex": self.regex,
            "ebnf": self.ebnf,
        }
        return SamplingParams(**{name: value for name, value in given.items() if value is not None})


class CompletionBody(OpenAIBody, frozen=True, kw_only=True):
    """`/v1/completions`. `prompt`: a text, a list of texts, token ids, or a list of lists of ids."""

    prompt: Text | Annotated[list[Text | TokenId | TokenIds], published(minItems=1)]
    echo: bool | None = None
    logprobs: TopLogprobs | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None


class TextPart(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A part of a message. Only text: images, audio and files are refused."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: None = None


class Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One turn of a chat. Parts of a content are joined by line breaks. Null in an assistant's only: an empty answer."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    # What an assistant's message may have besides text, so that an answer can be sent back as it came.
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: list[None] | None = None
    tool_calls: list[None] | None = None

    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class ChatBody(OpenAIBody, frozen=True, kw_only=True):
    """`/v1/chat/completions`. Without `max_completion_tokens` (or `max_tokens`) an answer may take what the context and half
    of the free pool leave.
    """

    messages: Annotated[list[Message], published(minItems=1, maxItems=MAX_MESSAGES)]
    max_completion_tokens: TokenCount | None = None
    logprobs: bool | None = None
    top_logprobs: TopLogprobs | None = None
    # Hints for billing, caching and reports of abuse, which change no answer.
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    prompt_cache_retention: Literal["in_memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None
    parallel_tool_calls: bool | None = None
    # Not implemented.
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[dict[str, Any]] | None = None
    function_call: str | dict[str, Any] | None = None
    store: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: Literal["none"] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    moderation: None = None
    prediction: None = None
    prompt_cache_options: None = None
    web_search_options: None = None
    chat_template: None = None
    chat_template_kwargs: None = None

    def check(self) -> None:
        """Raise BadRequestError saying what cannot be done as asked."""
        self.check_common()
        asks_nothing: dict[str, tuple[Any, ...]] = {
            "tools": (None, []),
            "tool_choice": (None, "none"),
            "functions": (None, []),
            "function_call": (None, "none"),
            "store": (None, False),
        }
        for name, values in asks_nothing.items():
            if getattr(self, name) not in values:
                raise BadRequestError(f"{name} is not implemented.", param=name)
        if not 1 <= len(self.messages) <= MAX_MESSAGES:
            raise BadRequestError(
                f"messages must hold 1 to {MAX_MESSAGES} messages, got {len(self.messages)}.",
                param="messages",
            )
        for index, message in enumerate(self.messages):
            _check_message(message, f"messages[{index}]")
        if self.top_logprobs and not self.logprobs:
            raise BadRequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
        if self.max_completion_tokens is not None and self.max_tokens not in (
            None,
            self.max_completion_tokens,
        ):
            raise BadRequestError(
                "max_tokens and max_completion_tokens are two names of one value; give one.",
                param="max_completion_tokens",
            )


def _check_message(message: Message, place: str) -> None:
    if message.content is None and message.role != "assistant":
        raise BadRequestError(f"{place} lacks content.", param=f"{place}.content")
    for name in ("annotations", "tool_calls"):
        if getattr(message, name):
            raise BadRequestError(f"{place}.{name} is not implemented.", param=f"{place}.{name}")
