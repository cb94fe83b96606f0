"""From the manager's answers, each with all of its text so far, to what a choice has new: text and the tokens it is made of."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import msgspec

from manylora.runtime.errors import RequestAbortedError
from manylora.runtime.http.openai.answer_types import (
    ChatLogprobs,
    CompletionLogprobs,
    FinishedBy,
    PromptTokensDetails,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from manylora.tokenizer_manager.answer import Aborted, Answer, MetaInfo, Stop
from manylora.tokenizer_manager.answer import TokenLogprob as Triple
from manylora.tokenizer_manager.incremental_decoder import IncrementalDecoder
from manylora.tokenizer_manager.tokenizer import Tokenizer

T = TypeVar("T")

LOWEST_LOGPROB = -9999.0  # JSON has no infinity


class Token(NamedTuple):
    """A token of a choice's text. `offset`: characters of that text before it. `logprob` null: nothing predicted it."""

    id: int
    logprob: float | None
    tops: list[Triple]
    offset: int


class Finish(NamedTuple):
    reason: FinishedBy
    matched: int | str | None


class Delta(NamedTuple):
    """What is new. `tokens` only if logprobs were asked for; they come when all of their text has."""

    text: str
    tokens: list[Token]
    finish: Finish | None


class Choice:
    """One choice on its way out: feed it every answer of its sequence, or the last one alone.

    What a stop string cuts off has no tokens here either, and the token that ended the sequence, which is not shown, has
    none: tokens are those of the text.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool, echo: str = "") -> None:
        """`echo`: the prompt's text, which comes before the answer's."""
        self._pieces = tokenizer.visible_pieces if skip_special_tokens else tokenizer.pieces
        self._decoder = IncrementalDecoder(self._pieces)
        self._echo = echo
        self._echo_told = False
        self._num_told = 0  # characters of the answer's text
        self._num_decoded = 0  # characters in the tokens seen
        self._pending: deque[tuple[Token, int, int]] = deque()  # with the start and end of their text

    def advance(self, answer: Answer) -> Delta:
        """What `answer` has that the one before had not. Raises RequestAbortedError."""
        meta = answer.meta_info
        if isinstance(meta.finish_reason, Aborted):
            raise RequestAbortedError(meta.finish_reason.message)
        text, tokens = answer.text[self._num_told :], []
        if not self._echo_told:
            self._echo_told = True
            text, tokens = self._echo + text, self._prompt_tokens(meta)
        self._num_told = len(answer.text)
        self._take_tokens(meta)
        tokens += self._release(meta)
        return Delta(text, tokens, _finish(meta))

    def _prompt_tokens(self, meta: MetaInfo) -> list[Token]:
        triples = _or_empty(meta.input_token_logprobs)
        decoder = IncrementalDecoder(self._pieces)
        starts: list[int] = []
        length = 0
        for _, token, _ in triples:
            starts.append(length)
            length += len(decoder.feed(token))
        surplus = length - len(self._echo)  # SentencePiece puts a blank before the first word
        tops = _or_empty(meta.input_top_logprobs) or [None] * len(triples)
        return [
            Token(token, _finite(logprob), top or [], max(0, start - surplus))
            for (logprob, token, _), top, start in zip(triples, tops, starts, strict=True)
        ]

    def _take_tokens(self, meta: MetaInfo) -> None:
        triples = _or_empty(meta.output_token_logprobs)
        tops = _or_empty(meta.output_top_logprobs) or [None] * len(triples)
        for (logprob, token, _), top in zip(triples, tops, strict=True):
            start = self._num_decoded
            self._num_decoded += len(self._decoder.feed(token))
            end = self._num_decoded + self._decoder.in_character  # its text comes with the character
            self._pending.append(
                (Token(token, _finite(logprob), top or [], len(self._echo) + start), start, end)
            )

    def _release(self, meta: MetaInfo) -> list[Token]:
        """The tokens whose text is out; at the end all that have any in it."""
        finish = meta.finish_reason
        if isinstance(finish, Stop) and isinstance(finish.matched, int) and self._pending:
            self._pending.pop()
        everything = finish is not None and not (isinstance(finish, Stop) and isinstance(finish.matched, str))
        out: list[Token] = []
        while self._pending:
            token, start, end = self._pending[0]
            shown = end <= self._num_told or (finish is not None and start < self._num_told)
            if not (everything or shown):
                break
            out.append(token)
            self._pending.popleft()
        return out


def completion_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> CompletionLogprobs:
    """The legacy columns. The candidates of a token always include itself."""
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        if token.logprob is None:
            tops.append(None)
            continue
        row: dict[str, float] = {}
        for logprob, candidate, _ in [*token.tops, (token.logprob, token.id, None)]:
            row.setdefault(_text(tokenizer, candidate), _finite(logprob) or 0.0)
        tops.append(row)
    return CompletionLogprobs(
        tokens=[_text(tokenizer, token.id) for token in tokens],
        token_logprobs=[token.logprob for token in tokens],
        top_logprobs=tops,
        text_offset=[token.offset for token in tokens],
    )


def chat_logprobs(tokens: Sequence[Token], tokenizer: Tokenizer) -> ChatLogprobs:
    return ChatLogprobs(
        [
            TokenLogprob(
                _text(tokenizer, token.id),
                token.logprob or 0.0,
                list(_piece(tokenizer, token.id)),
                [
                    TopLogprob(
                        _text(tokenizer, candidate),
                        _finite(logprob) or 0.0,
                        list(_piece(tokenizer, candidate)),
                    )
                    for logprob, candidate, _ in token.tops
                ],
            )
            for token in tokens
        ]
    )


def make_usage(metas: Sequence[MetaInfo], n: int) -> Usage:
    """Of all choices in order, `n` for each prompt. What a prompt found cached is what its first choice found."""
    prompt_tokens = sum(meta.prompt_tokens for meta in metas[::n])
    completion_tokens = sum(meta.completion_tokens for meta in metas)
    cached = sum(meta.cached_tokens for meta in metas[::n])
    return Usage(
        prompt_tokens, completion_tokens, prompt_tokens + completion_tokens, PromptTokensDetails(cached)
    )


def _finish(meta: MetaInfo) -> Finish | None:
    if meta.finish_reason is None:
        return None
    if isinstance(meta.finish_reason, Stop):
        return Finish("stop", meta.finish_reason.matched)
    return Finish("length", None)


def _finite(logprob: float | None) -> float | None:
    return None if logprob is None else max(logprob, LOWEST_LOGPROB)


def _or_empty(values: list[T] | msgspec.UnsetType) -> list[T]:
    return [] if values is msgspec.UNSET else values


def _piece(tokenizer: Tokenizer, token: int) -> bytes:
    return tokenizer.pieces[token] if token < tokenizer.vocab_size else b""


def _text(tokenizer: Tokenizer, token: int) -> str:
    """A token's text; of part of a character its bytes, so that different tokens stay different."""
    piece = _piece(tokenizer, token)
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
