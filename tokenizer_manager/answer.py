"""What a client gets for one sequence: the JSON of `/generate`, as typed values."""

from __future__ import annotations

from typing import Any

import msgspec

# [logprob, token id, text or null]; the first token of a prompt has no logprob.
TokenLogprob = tuple[float | None, int, str | None]


class FinishReason(msgspec.Struct, frozen=True, tag_field="type"):
    """Why a sequence ended."""


class Length(FinishReason, frozen=True, tag="length"):
    length: int


class Stop(FinishReason, frozen=True, tag="stop"):
    """`matched`: the eos or stop id, or the stop string."""

    matched: int | str | None


class Aborted(FinishReason, frozen=True, tag="abort"):
    message: str


class MetaInfo(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`lora_name` and `lora_version` say which weights answered (version 0: the base model). `finish_reason` is null
    while the sequence runs; logprob fields are there only if asked for. `e2e_latency`: seconds since the call arrived.
    """

    id: str
    finish_reason: Length | Stop | Aborted | None
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    e2e_latency: float
    lora_name: str | None
    lora_version: int
    input_token_logprobs: list[TokenLogprob] | msgspec.UnsetType = msgspec.UNSET
    output_token_logprobs: list[TokenLogprob] | msgspec.UnsetType = msgspec.UNSET
    input_top_logprobs: list[list[TokenLogprob] | None] | msgspec.UnsetType = msgspec.UNSET
    output_top_logprobs: list[list[TokenLogprob] | None] | msgspec.UnsetType = msgspec.UNSET


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """All of one sequence so far. `index`: in a stream of a list, its place in the list; else absent."""

    text: str
    output_ids: list[int]
    meta_info: MetaInfo
    index: int | msgspec.UnsetType = msgspec.UNSET

    def to_dict(self) -> dict[str, Any]:
        """The same as plain Python values, as `Engine.generate` returns it."""
        return msgspec.to_builtins(self)
