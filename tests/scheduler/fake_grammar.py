"""Grammars made of hashes: which tokens may follow a text depends on every token of it, so a matcher that is wrong shows.

A grammar's text ends in a digit: so many tokens, and nothing may follow; the end token may come earlier at times.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from manylora.runtime.errors import BadGrammarError, GrammarTooComplexError
from manylora.scheduler.grammar import (
    Compiled,
    CompileJob,
    Grammar,
    GrammarAnswer,
    GrammarJob,
    Masked,
    without,
)
from tests.scheduler.fake_worker import VOCAB, mix

EOS = 7
BAD, STUCK = "bad", "stuck"  # cannot be compiled; cannot go on after its first token


def allowed(text: str, tokens: list[int]) -> set[int]:
    """What may follow `tokens`."""
    free = {t for t in range(VOCAB) if t != EOS and mix("grammar", text, tokens, t) % 3 == 0}
    ends = mix("end", text, tokens) % 6 == 0 or not free
    return free | {EOS} if ends else free


def complete(text: str, tokens: list[int]) -> bool:
    """Whether nothing may follow `tokens`."""
    return EOS in tokens or len(tokens) == int(text[-1])


@dataclass
class FakeMatcher:
    text: str
    tokens: list[int] = field(default_factory=list)

    def copy(self) -> FakeMatcher:
        return FakeMatcher(self.text, list(self.tokens))

    def accept(self, token: int) -> bool:
        assert not complete(self.text, self.tokens), "a token after the end"
        assert token in allowed(self.text, self.tokens), "a token that no mask allowed"
        if self.text.startswith(STUCK) and self.tokens:
            raise GrammarTooComplexError("stuck")
        self.tokens.append(token)
        return complete(self.text, self.tokens)

    def mask(self) -> bytes:
        bits = sum(1 << token for token in allowed(self.text, self.tokens))
        return bits.to_bytes(4 * -(-VOCAB // 32), "little")


def do(job: GrammarJob, *, fail: bool = False) -> GrammarAnswer:
    """The answer to a job."""
    too_complex = GrammarTooComplexError("too much work").info()
    if isinstance(job, CompileJob):
        if job.source.text.startswith(BAD):
            return Compiled(job.source, BadGrammarError("malformed").info())
        matcher = FakeMatcher(job.source.text)
        return Compiled(job.source, too_complex if fail else Grammar(matcher, matcher.mask()))
    return Masked(job.constraint, too_complex if fail else without(job.constraint.matcher.mask(), job.banned))
