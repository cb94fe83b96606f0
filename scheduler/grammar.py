"""What a text must match: the grammar of a request, the matcher of a sequence, and the mask of its next token.

A grammar is compiled and a mask is computed beside the step loop (`grammar_threads.py`); what is here is bookkeeping. A
mask is ⌈vocabulary / 32⌉ int32 words as bytes; bit i of byte b says whether token 8 · b + i may be drawn.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from manylora.runtime.errors import ErrorInfo
from manylora.runtime.sampling_params import SamplingParams


class GrammarSource(NamedTuple):
    """A grammar as the client wrote it. kind: "json_schema", "regex" or "ebnf"."""

    kind: str
    text: str


class Matcher(Protocol):
    """How far a text has come in its grammar. In one thread at a time."""

    def copy(self) -> Matcher:
        """Another one at the same place."""
        ...

    def accept(self, token: int) -> bool:
        """Go on by a token. True: nothing may follow. Raises GrammarTooComplexError."""
        ...

    def mask(self) -> bytes:
        """The tokens that may follow, the model's end tokens exactly where the text may end. May take its time.

        Raises GrammarTooComplexError, or BadGrammarError if there is no such token.
        """
        ...


class Constraint:
    """One sequence's grammar: `matcher` has accepted every known token.

    mask: of the token after them, already without what the request forbids; None: still being computed.
    """

    __slots__ = ("_banned", "_banned_early", "_min_new", "end_ids", "handle", "mask", "matcher")

    def __init__(
        self, handle: int, matcher: Matcher, mask: bytes, params: SamplingParams, eos_ids: tuple[int, ...]
    ) -> None:
        """`mask`: the matcher's, before the first token."""
        self.handle = handle
        self.end_ids = eos_ids  # one of them ends the text even if the request ignores them, where nothing else may follow
        self.matcher = matcher
        self._min_new = params.min_new_tokens
        self._banned = eos_ids if params.ignore_eos else ()
        self._banned_early = (*eos_ids, *(params.stop_token_ids or ()))
        self.mask: bytes | None = without(mask, self.banned(0))

    def banned(self, generated: int) -> tuple[int, ...]:
        """What may not be drawn after so many tokens, as long as the grammar allows another token."""
        return self._banned_early if generated < self._min_new else self._banned


@dataclass(frozen=True, slots=True)
class CompileJob:
    """Answered by Compiled."""

    source: GrammarSource


@dataclass(frozen=True, slots=True)
class MaskJob:
    """Answered by Masked. Until then the constraint's matcher is the job's alone."""

    constraint: Constraint
    banned: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Grammar:
    """A compiled grammar: a matcher at its beginning, to be copied, and the first mask."""

    matcher: Matcher
    mask: bytes


@dataclass(frozen=True, slots=True)
class Compiled:
    source: GrammarSource
    outcome: Grammar | ErrorInfo


@dataclass(frozen=True, slots=True)
class Masked:
    """`outcome`: the mask without what was banned, or why there is none."""

    constraint: Constraint
    outcome: bytes | ErrorInfo


GrammarJob = CompileJob | MaskJob
GrammarAnswer = Compiled | Masked


def source_of(params: SamplingParams) -> GrammarSource | None:
    """The grammar that a request's text must match; None if it has none or draws no token."""
    given = params.grammar
    return GrammarSource(*given) if given is not None and params.max_new_tokens != 0 else None


def without(mask: bytes, banned: Iterable[int]) -> bytes:
    """The mask without these tokens; the mask itself if it allows no other."""
    narrowed = bytearray(mask)
    for token in banned:
        narrowed[token >> 3] &= ~(1 << (token & 7))
    return bytes(narrowed) if any(narrowed) else mask
