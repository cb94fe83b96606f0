"""One call for text as the front understands it: checked, normalised, not yet tokenized.

`/generate` and `Engine.generate` both become a `GenerateCall`; `TokenizerManager` answers it.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from manylora.runtime.bounds import MAX_RID_LENGTH, MAX_STOP_LENGTH, MAX_STOP_TOKEN_IDS, MAX_TOP_LOGPROBS
from manylora.runtime.errors import BadRequestError, ContextLengthError
from manylora.runtime.messages import ServerInfo
from manylora.runtime.sampling_params import DEFAULT_MAX_NEW_TOKENS, SamplingParams


class Prompt(msgspec.Struct, frozen=True):
    """One input of a call and what is asked of it. `text` or `input_ids`, the other is None.

    `logprob_start_len` -1: logprobs of generated tokens only. `new_logprobs_only`: in a stream each answer has only those
    that the one before had not. `default_new_tokens`: most tokens of an answer for which no max_new_tokens is given.
    """

    rid: str
    params: SamplingParams
    text: str | None = None
    input_ids: list[int] | None = None
    lora_name: str | None = None
    return_logprob: bool = False
    top_logprobs_num: int = 0
    logprob_start_len: int = -1
    return_text_in_logprobs: bool = False
    new_logprobs_only: bool = False
    default_new_tokens: int = DEFAULT_MAX_NEW_TOKENS


class GenerateCall(msgspec.Struct, frozen=True):
    """All inputs of one call: admitted whole or refused whole.

    `as_list`: the client gave a list, so it gets one. With params.n > 1 it gets one as well (`answers_list`).
    `add_special_tokens`: texts get what the tokenizer adds (BOS); a rendered chat has its own.
    """

    prompts: Sequence[Prompt]
    as_list: bool = False
    add_special_tokens: bool = True

    @property
    def answers_list(self) -> bool:
        return self.as_list or self.num_sequences > 1

    @property
    def name(self) -> str:
        """What a log calls it: the id of its first prompt, and how many more there are."""
        more = len(self.prompts) - 1
        return f"{self.prompts[0].rid} and {more} more" if more > 0 else self.prompts[0].rid

    @property
    def num_sequences(self) -> int:
        return sum(prompt.params.n for prompt in self.prompts)


def check_prompt(prompt: Prompt, info: ServerInfo) -> None:
    """Everything that can be refused before tokenizing. Raises BadRequestError naming the field."""
    params = prompt.params
    params.validate(info.model.vocab_size, prompt.default_new_tokens)
    if len(prompt.rid) > MAX_RID_LENGTH:
        raise BadRequestError(f"rid has at most {MAX_RID_LENGTH} characters.", param="rid")
    if params.seed is not None and params.sampling_seed not in (None, params.seed):
        raise BadRequestError(
            "seed and sampling_seed are two names of one value; give one.", param="sampling_params.seed"
        )
    if any(len(stop) > MAX_STOP_LENGTH for stop in params.stop_strings):
        raise BadRequestError(
            f"a stop string has at most {MAX_STOP_LENGTH} characters.", param="sampling_params.stop"
        )
    room = MAX_STOP_TOKEN_IDS - len(info.model.eos_token_ids)
    if len(params.stop_token_ids or ()) > room:
        raise BadRequestError(
            f"stop_token_ids takes at most {room} ids.", param="sampling_params.stop_token_ids"
        )
    most_top = min(MAX_TOP_LOGPROBS, info.model.vocab_size)
    if not 0 <= prompt.top_logprobs_num <= most_top:
        raise BadRequestError(
            f"top_logprobs_num must be in [0, {most_top}], got {prompt.top_logprobs_num}.",
            param="top_logprobs_num",
        )
    if prompt.input_ids is not None:
        _check_ids(prompt.input_ids, info.model.vocab_size)
    elif not prompt.text:
        raise BadRequestError("text cannot be empty.", param="text")


def check_encoded(ids: list[int], vocab_size: int) -> None:
    """Raise BadRequestError if a text has a token the model has no embedding of: some tokenizers know more."""
    if max(ids, default=0) >= vocab_size:
        raise BadRequestError(
            f"text has the token {max(ids)}, the model's vocabulary has {vocab_size} tokens.", param="text"
        )


def _check_ids(ids: list[int], vocab_size: int) -> None:
    if not ids:
        raise BadRequestError("input_ids cannot be empty.", param="input_ids")
    if min(ids) < 0 or max(ids) >= vocab_size:
        wrong = next(token for token in ids if not 0 <= token < vocab_size)
        raise BadRequestError(
            f"input_ids holds {wrong}, the vocabulary has {vocab_size} tokens.", param="input_ids"
        )


def fit_params(prompt: Prompt, num_tokens: int, info: ServerInfo) -> SamplingParams:
    """The prompt's parameters with `max_new_tokens` and `seed` settled. `num_tokens`: of the prompt.

    Raises ContextLengthError if prompt and new tokens exceed the context, BadRequestError if logprob_start_len lies
    outside the prompt.
    """
    if num_tokens == 0:
        raise BadRequestError("text has no tokens.", param="text")
    params, context = prompt.params, info.context_length
    room = context - num_tokens
    if room <= 0:
        raise ContextLengthError(
            f"The prompt has {num_tokens} tokens, which leaves no room in the model's context of {context} tokens.",
            param="text" if prompt.text is not None else "input_ids",
        )
    wanted = params.max_new_tokens
    if wanted is None:
        # Half of the pool stays for adapters: nobody asked for so long an answer.
        pool_share = max(DEFAULT_MAX_NEW_TOKENS, (info.max_total_tokens - num_tokens) // 2)
        wanted = min(prompt.default_new_tokens, room, pool_share)
    if wanted > room:
        raise ContextLengthError(
            f"The prompt has {num_tokens} tokens and max_new_tokens is {wanted}: together {num_tokens + wanted}, "
            f"more than the model's context of {context} tokens.",
            param="sampling_params.max_new_tokens",
        )
    if params.min_new_tokens > wanted:
        raise ContextLengthError(
            f"min_new_tokens is {params.min_new_tokens}, but the prompt's {num_tokens} tokens leave room for {room}.",
            param="sampling_params.min_new_tokens",
        )
    if not -1 <= prompt.logprob_start_len < num_tokens:
        raise BadRequestError(
            f"logprob_start_len must be in [-1, {num_tokens}), the prompt's length, got {prompt.logprob_start_len}.",
            param="logprob_start_len",
        )
    return msgspec.structs.replace(
        params,
        max_new_tokens=wanted,
        seed=params.sampling_seed if params.seed is None else params.seed,
        sampling_seed=None,
    )
