"""llguidance as the scheduler uses it: a tokenizer built once, grammars compiled under limits, matchers, masks.

Its parser works on bytes and knows which tokens stand for them, so a text may be cut anywhere. Where the grammar leaves one
way to go on, it allows only the tokens that the tokenizer itself would make of that text.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from manylora.runtime.errors import BadGrammarError, GrammarTooComplexError

# What a grammar may cost beside its size: work to build its lexer, and work and memory of each step. Large published
# schemas stay below half of the first.
_LIMITS = LLParserLimits(
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    max_lexer_states=50_000,
    max_grammar_size=200_000,
    verbose_errors=False,
)
_TOO_COMPLEX = ("too complex", "too large", "too many", "too deep", "limit", "fuel")
_DEAD_END = "NoExtension"
_MAX_MESSAGE = 500  # characters of llguidance's own words


class GuidanceTokenizer:
    """The model's `tokenizer.json` as llguidance sees it."""

    def __init__(self, directory: str | Path, vocab_size: int, eos_ids: Sequence[int]) -> None:
        """`vocab_size`: of the model's logits. Holds the interpreter's lock for up to a second.

        Raises BadGrammarError if llguidance cannot work with the tokenizer.
        """
        path = str(Path(directory) / "tokenizer.json")
        try:
            self.tokenizer = _load(path, vocab_size, list(eos_ids))
        except BaseException as error:  # a panic of the library is no Exception
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            raise BadGrammarError(f"This model's tokenizer knows no structured output: {error}") from None
        self._mask_bytes = 4 * -(-vocab_size // 32)
        self._last_bits = (1 << (vocab_size - 8 * (self._mask_bytes - 4))) - 1

    def compile(self, grammar: str) -> GuidanceMatcher:
        """A grammar in llguidance's own form (`guidance_form`). Without the interpreter's lock.

        Raises BadGrammarError or GrammarTooComplexError.
        """
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return GuidanceMatcher(matcher, self)

    def fit(self, mask: bytes) -> bytes:
        """Cut to the model's vocabulary, where the tokenizer knows more."""
        mask = mask[: self._mask_bytes].ljust(self._mask_bytes, b"\0")
        last = int.from_bytes(mask[-4:], "little") & self._last_bits
        return mask[:-4] + last.to_bytes(4, "little")


class GuidanceMatcher:
    """`scheduler.grammar.Matcher` by llguidance."""

    def __init__(self, matcher: LLMatcher, tokenizer: GuidanceTokenizer) -> None:
        self._matcher = matcher
        self._tokenizer = tokenizer

    def copy(self) -> GuidanceMatcher:
        return GuidanceMatcher(self._matcher.deep_copy(), self._tokenizer)

    def accept(self, token: int) -> bool:
        if not self._matcher.consume_token(token):  # every mask allowed it: only a limit can be in the way
            raise GrammarTooComplexError(f"The grammar cannot go on: {_brief(self._matcher.get_error())}")
        return self._matcher.is_stopped()

    def mask(self) -> bytes:
        mask = self._tokenizer.fit(self._matcher.compute_bitmask())
        if self._matcher.is_error():
            error = self._matcher.get_error()
            if _DEAD_END not in error:
                raise GrammarTooComplexError(f"The grammar cannot go on: {_brief(error)}")
        elif any(mask):
            return mask
        raise BadGrammarError("The grammar wants a text that no token of the model can continue.")


def _load(path: str, vocab_size: int, eos_ids: list[int]) -> LLTokenizer:
    try:
        return LLTokenizer(path, n_vocab=vocab_size, eos_token=eos_ids or None)
    except ValueError:  # it knows more tokens than the model, or not all end tokens
        smaller = LLTokenizer(path)
        known = [token for token in eos_ids if token < smaller.vocab_size]
        size = max(vocab_size, smaller.vocab_size)
        return LLTokenizer(path, n_vocab=size, eos_token=known or None)


def _refusal(message: str) -> BadGrammarError | GrammarTooComplexError:
    brief = _brief(message)
    if any(word in brief for word in _TOO_COMPLEX):
        return GrammarTooComplexError(f"The grammar is too complex: {brief}")
    return BadGrammarError(f"The grammar cannot be compiled: {brief}")


def _brief(message: str) -> str:
    return message.replace("<non-verbose/>", "").strip()[:_MAX_MESSAGE]
