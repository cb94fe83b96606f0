"""The bodies of the HTTP routes, typed. What a client may write and nothing else: an unknown field is a 400 by name.

`Engine` fills the same types, so that both ways in have the same checks and messages.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, cast

import msgspec

from manylora.runtime.bounds import (
    MAX_INPUTS,
    AdapterName,
    RequestId,
    Text,
    TokenId,
    TokenIds,
    TopLogprobs,
    published,
)
from manylora.runtime.errors import BadRequestError
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.generate_call import GenerateCall, Prompt

MAX_SEQUENCES = 4096  # inputs times their n

T = TypeVar("T")
_INPUTS = published(minItems=1, maxItems=MAX_INPUTS)
_Start = Annotated[int, published(minimum=-1)]
_PLACE = re.compile(r" - at (?:`key` in )?`\$\.?([^`]*)`\Z")
_UNKNOWN_FIELD = re.compile(r"unknown field `([^`]*)`")


class GenerateBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`/generate`. `text` or `input_ids`, one or a list; of a list, the other fields are one for all or one each.

    `lora_path` is the *name* of a loaded adapter; null is the base model.
    """

    text: Text | Annotated[list[Text], _INPUTS] | None = None
    input_ids: Annotated[list[TokenId | TokenIds], published(minItems=1)] | None = None
    sampling_params: SamplingParams | list[SamplingParams] | None = None
    lora_path: str | list[str | None] | None = None
    stream: bool = False
    rid: RequestId | list[RequestId] | None = None
    return_logprob: bool | list[bool] | None = None
    top_logprobs_num: TopLogprobs | list[TopLogprobs] | None = None
    logprob_start_len: _Start | list[_Start] | None = None
    return_text_in_logprobs: bool = False
    # The seeds' other fields, at the value that asks for nothing; no other is implemented.
    input_embeds: None = None
    image_data: None = None
    video_data: None = None
    audio_data: None = None
    modalities: None = None
    token_ids_logprob: None = None
    session_params: None = None
    custom_logit_processor: None = None
    priority: None = None
    return_hidden_states: bool = False
    log_metrics: bool = True
    no_logs: bool = False

    def to_call(self) -> GenerateCall:
        """Spread the fields over the inputs. Raises BadRequestError."""
        if self.return_hidden_states:
            raise BadRequestError("return_hidden_states is not implemented.", param="return_hidden_states")
        texts, id_lists, count, as_list = self._inputs()
        params = _spread("sampling_params", self.sampling_params, count, as_list, SamplingParams())
        if sum(max(one.n, 1) for one in params) > MAX_SEQUENCES:
            raise BadRequestError(f"a call has at most {MAX_SEQUENCES} sequences.", param="sampling_params.n")
        columns = zip(
            self._rids(count, as_list),
            params,
            texts,
            id_lists,
            _spread("lora_path", self.lora_path, count, as_list, None),
            _spread("return_logprob", self.return_logprob, count, as_list, False),
            _spread("top_logprobs_num", self.top_logprobs_num, count, as_list, 0),
            _spread("logprob_start_len", self.logprob_start_len, count, as_list, -1),
            [self.return_text_in_logprobs] * count,
            strict=True,
        )
        return GenerateCall([Prompt(*fields) for fields in columns], as_list)

    def _inputs(self) -> tuple[Sequence[str | None], Sequence[list[int] | None], int, bool]:
        """Texts and id lists (one of them all None), how many, and whether the client gave a list."""
        if (self.text is None) == (self.input_ids is None):
            raise BadRequestError("Either text or input_ids should be provided, not both.", param="text")
        if self.text is not None:
            texts = [self.text] if isinstance(self.text, str) else self.text
            _check_count("text", len(texts))
            return texts, [None] * len(texts), len(texts), isinstance(self.text, list)
        ids = cast("list[int | list[int]]", self.input_ids)
        if not ids:
            raise BadRequestError("input_ids cannot be empty.", param="input_ids")
        if all(isinstance(one, int) for one in ids):
            return [None], [cast("list[int]", ids)], 1, False
        if any(isinstance(one, int) for one in ids):
            raise BadRequestError("input_ids mixes ids and lists of ids.", param="input_ids")
        _check_count("input_ids", len(ids))
        return [None] * len(ids), cast("list[list[int]]", ids), len(ids), True

    def _rids(self, count: int, as_list: bool) -> Sequence[str]:
        if self.rid is None:
            return [uuid.uuid4().hex for _ in range(count)]
        if as_list and isinstance(self.rid, str):
            return [f"{self.rid}_{i}" for i in range(count)]
        return _spread("rid", self.rid, count, as_list, "")


class LoadAdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`/load_lora_adapter`. `lora_path` is a directory or a hub id."""

    lora_name: AdapterName
    lora_path: Text
    pinned: bool = False
    replace: bool = False


class UnloadAdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`/unload_lora_adapter`."""

    lora_name: str


class AdapterResult(msgspec.Struct, frozen=True, omit_defaults=True):
    """What both answer. `loaded_adapters`: name -> path in load order; null if the request was not understood. `code`: of
    the error, where there is one.
    """

    success: bool
    error_message: str
    loaded_adapters: dict[str, str] | None
    code: str | msgspec.UnsetType = msgspec.UNSET


class AbortBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`/abort_request`. `rid` is matched by prefix."""

    rid: str = ""
    abort_all: bool = False

    def check(self) -> None:
        if not self.rid and not self.abort_all:
            raise BadRequestError("give rid, or abort_all: true.", param="rid")


def decode_body(body: bytes, kind: type[T]) -> T:
    """JSON to a body of `kind`. Raises BadRequestError saying what is wrong and where."""
    try:
        return msgspec.json.decode(body, type=kind, strict=True)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _bad_request(error) from error


def convert_body(fields: dict[str, Any], kind: type[T], *, strict: bool = True) -> T:
    """The same from Python values, for `Engine`; not strict: from texts, as those of a query."""
    try:
        return msgspec.convert(fields, type=kind, strict=strict)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise _bad_request(error) from error


def _bad_request(error: Exception) -> BadRequestError:
    message = str(error)
    place = _PLACE.search(message)
    unknown = _UNKNOWN_FIELD.search(message)
    path = [place[1] if place else "", unknown[1] if unknown else ""]
    return BadRequestError(message, param=".".join(filter(None, path)) or None)


def _check_count(name: str, count: int) -> None:
    if not 1 <= count <= MAX_INPUTS:
        raise BadRequestError(f"{name} must hold 1 to {MAX_INPUTS} inputs, got {count}.", param=name)


def _spread(name: str, value: T | list[T] | None, count: int, as_list: bool, default: T) -> Sequence[T]:
    """One value per input, from one for all or a list of one each."""
    if isinstance(value, list):
        values = cast("list[T]", value)
        if not as_list:
            raise BadRequestError(f"{name} is a list, but there is one input and no list.", param=name)
        if len(values) != count:
            raise BadRequestError(f"{name} has {len(values)} entries for {count} inputs.", param=name)
        return values
    return [default if value is None else value] * count
