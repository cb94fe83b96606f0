"""Real grammars on real tokenizers: masks against brute force, refusals by code, limits, and threads that hold up nobody."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from manylora.runtime.errors import BadGrammarError, GrammarTooComplexError
from manylora.runtime.sampling_params import SamplingParams
from manylora.scheduler import grammar_threads
from manylora.scheduler.grammar import (
    Compiled,
    CompileJob,
    Constraint,
    Grammar,
    GrammarAnswer,
    GrammarSource,
    Masked,
    MaskJob,
    without,
)
from manylora.scheduler.grammar_checker import Question, check, guidance_form
from manylora.scheduler.grammar_threads import GrammarThreads
from manylora.scheduler.guidance import GuidanceMatcher, GuidanceTokenizer
from manylora.tokenizer_manager.tokenizer import Tokenizer
from tests.tiny_models import EOS_ID, VOCAB_SIZE, save_tokenizer
from tests.tokenizer_manager.tiny_tokenizer import save_sentencepiece

LARGE = "((a{1000}){1000}){1000}"  # takes seconds and all the memory it gets
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "tags": {"type": "array", "items": {"enum": ["é", "世界", "x\ny"]}, "minItems": 1, "maxItems": 3},
        "size": {"type": "integer", "minimum": -5, "maximum": 1200},
    },
    "required": ["name", "tags", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> GuidanceTokenizer:
    return GuidanceTokenizer(directory, VOCAB_SIZE, [EOS_ID])


def compiled(tokenizer: GuidanceTokenizer, kind: str, text: str) -> GuidanceMatcher:
    return tokenizer.compile(guidance_form(kind, text))


def tokens_in(mask: bytes) -> list[int]:
    return [8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1]


def walk(matcher: GuidanceMatcher, choose: random.Random, limit: int = 400) -> list[int]:
    """Tokens at random until the text is complete."""
    tokens: list[int] = []
    while len(tokens) < limit:
        tokens.append(choose.choice(tokens_in(matcher.mask())))
        if matcher.accept(tokens[-1]):
            return tokens
    raise AssertionError("no end")


def text_of(directory: Path, tokens: list[int]) -> str:
    pieces = Tokenizer(directory).visible_pieces
    return b"".join(pieces[token] for token in tokens).decode()


def test_every_text_matches_its_schema(tokenizer: GuidanceTokenizer, directory: Path) -> None:
    matcher = compiled(tokenizer, "json_schema", json.dumps(SCHEMA))
    texts = {text_of(directory, walk(matcher.copy(), random.Random(seed))) for seed in range(25)}
    assert len(texts) > 20
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


GBNF = r"""
root ::= greeting (", " name)* end  # a comment
greeting ::= "hello" | "sal\u00fct" | "\u4f60\U0000597d"
name ::= [a-c\u00e9-\u00eb]{1,4}
end ::= "!" | "\\u0041"
"""
LARK = 'start: word (" " word)*\nword: /[a-d]{1,3}/ | "世"'


@pytest.mark.parametrize(
    ("kind", "grammar", "pattern"),
    [
        ("regex", r"(é|世)+[0-9]{2,3}|[a-zß]?", r"(é|世)+[0-9]{2,3}|[a-zß]?"),
        ("regex", r"^a(b|c)$", r"a(b|c)"),
        ("ebnf", GBNF, r"(hello|salüt|你好)(, [a-cé-ë]{1,4})*(!|\\u0041)"),
        ("ebnf", LARK, r"([a-d]{1,3}|世)( ([a-d]{1,3}|世))*"),
    ],
)
def test_every_text_matches_its_pattern(
    tokenizer: GuidanceTokenizer, directory: Path, kind: str, grammar: str, pattern: str
) -> None:
    matcher = compiled(tokenizer, kind, grammar)
    for seed in range(25):
        text = text_of(directory, walk(matcher.copy(), random.Random(seed)))
        assert re.fullmatch(pattern, text), text


def test_a_mask_allows_what_can_become_a_match_and_nothing_else(
    tokenizer: GuidanceTokenizer, directory: Path
) -> None:
    """The language is finite, so that brute force knows every prefix."""
    language = {
        f"{a}{b}{c}" for a in ("the", "capital", "é") for b in (" of", "é ", "") for c in ("0", "17", "ß")
    }
    prefixes = {text.encode()[:end] for text in language for end in range(len(text.encode()) + 1)}
    pieces = Tokenizer(directory).visible_pieces
    matcher = compiled(tokenizer, "regex", "(the|capital|é)( of|é |)(0|17|ß)")
    checked = 0
    for seed in range(20):
        choose, at, text = random.Random(seed), matcher.copy(), b""
        while text.decode("utf-8", "replace") not in language:
            allowed = tokens_in(at.mask())
            possible = [t for t, piece in enumerate(pieces) if piece and text + piece in prefixes]
            assert EOS_ID not in allowed
            # Where there is one way to go on, only the tokenizer's own cut of it is allowed.
            ways = {min(text + pieces[t], text + pieces[u], key=len) for t in possible for u in possible}
            if all(a.startswith(b) or b.startswith(a) for a in ways for b in ways):
                assert set(allowed) <= set(possible)
                assert allowed
            else:
                assert set(allowed) == set(possible)
                checked += 1
            token = choose.choice(allowed)
            text += pieces[token]
            at.accept(token)
    assert checked > 20


def test_the_end_is_allowed_exactly_where_the_text_may_end(tokenizer: GuidanceTokenizer) -> None:
    matcher = compiled(tokenizer, "regex", "[0-9]{2,4}")
    ends: list[bool] = []
    while True:
        allowed = tokens_in(matcher.mask())
        ends.append(EOS_ID in allowed)
        digit = next(token for token in allowed if token != EOS_ID)
        if matcher.accept(digit):
            break
    assert ends[0] is False
    ending = compiled(tokenizer, "regex", "a*")
    assert EOS_ID in tokens_in(ending.mask())
    assert ending.accept(EOS_ID)


def test_a_grammar_of_the_empty_text_allows_only_its_end(tokenizer: GuidanceTokenizer) -> None:
    assert tokens_in(compiled(tokenizer, "regex", "").mask()) == [EOS_ID]


def test_copies_go_their_own_ways(tokenizer: GuidanceTokenizer) -> None:
    one = compiled(tokenizer, "regex", "(ab|cd)e")
    other = one.copy()
    before = other.mask()
    one.accept(tokens_in(one.mask())[0])
    assert one.mask() != before
    assert other.mask() == before


def test_masks_are_as_wide_as_the_models_logits(directory: Path) -> None:
    """A model may have more rows than its tokenizer has tokens, or fewer."""
    for vocab_size in (VOCAB_SIZE + 45, VOCAB_SIZE - 9):
        tokenizer = GuidanceTokenizer(directory, vocab_size, [EOS_ID])
        matcher = compiled(tokenizer, "regex", "(?s).*")
        mask = matcher.mask()
        assert len(mask) == 4 * -(-vocab_size // 32)
        assert max(tokens_in(mask)) < min(vocab_size, VOCAB_SIZE)
        assert without(mask, [vocab_size - 1])


def test_sentencepiece_tokens_are_understood(tmp_path: Path) -> None:
    save_sentencepiece(tmp_path)
    tokenizer = GuidanceTokenizer(tmp_path, Tokenizer(tmp_path).vocab_size, [2])
    matcher = compiled(tokenizer, "regex", "(hello|a) [b-d]{2}é")
    for seed in range(5):
        text = text_of(tmp_path, walk(matcher.copy(), random.Random(seed)))
        assert re.fullmatch("(hello|a) [b-d]{2}é", text), text


def test_a_tokenizer_that_is_not_there_refuses_every_grammar(tmp_path: Path) -> None:
    with pytest.raises(BadGrammarError, match="tokenizer"):
        GuidanceTokenizer(tmp_path, 10, [1])


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("json_schema", "{", "malformed"),
        ("json_schema", "[1]", "object or a boolean"),
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", '{"not": {}}', "not"),
        ("json_schema", '{"$ref": "http://example.com/x"}', "example.com"),
        ("json_schema", "false", "false"),
        ("regex", "(", "unclosed"),
        ("regex", "a(?=b)", "look-ahead"),
        ("ebnf", "", "root"),
        ("ebnf", 'root ::= "a" | other', "other"),
        ("ebnf", 'root ::= "\\ud800"', "no character"),
        ("ebnf", "start: other", "other"),
        ("ebnf", 'start: a\na: a "x"', "no token"),
    ],
)
def test_a_bad_grammar_is_refused_with_the_reason(
    tokenizer: GuidanceTokenizer, kind: str, text: str, message: str
) -> None:
    error = check(tokenizer, Question(kind, text)).error
    assert error is not None
    assert (error.code, error.status) == ("bad_grammar", 400)
    assert message in error.message


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("ebnf", "root ::= " + "(" * 3000 + '"a"' + ")" * 3000),
        ("json_schema", '{"items":' * 30000 + "{}" + "}" * 30000),
        ("json_schema", json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {}}} for j in range(6)]} for i in range(8)]})),
    ],
)  # fmt: skip
def test_a_grammar_that_is_too_large_is_refused(tokenizer: GuidanceTokenizer, kind: str, text: str) -> None:
    error = check(tokenizer, Question(kind, text)).error
    assert error is not None
    assert error.code == "grammar_too_complex"


# ---- threads --------------------------------------------------------------------------------------------------------


@pytest.fixture
def threads(directory: Path) -> Iterator[GrammarThreads]:
    made = GrammarThreads(directory, VOCAB_SIZE, (EOS_ID,))
    yield made
    made.close()


def answers(threads: GrammarThreads, count: int) -> list[GrammarAnswer]:
    taken: list[GrammarAnswer] = []
    deadline = time.monotonic() + 60
    while len(taken) < count:
        taken += threads.take()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    return taken


def outcomes(threads: GrammarThreads, *sources: tuple[str, str]) -> list[Any]:
    threads.submit([CompileJob(GrammarSource(*source)) for source in sources])
    taken = answers(threads, len(sources))
    assert [answer.source for answer in taken if isinstance(answer, Compiled)] == list(sources)
    return [answer.outcome for answer in taken]


def test_a_runaway_is_stopped_and_masks_go_on_meanwhile(threads: GrammarThreads) -> None:
    [good] = outcomes(threads, ("regex", "[a-z]{3}"))
    assert isinstance(good, Grammar)
    threads.submit([CompileJob(GrammarSource("regex", LARGE))])
    params, masks, end = SamplingParams(), 0, None
    while end is None:
        constraint = Constraint(1, good.matcher.copy(), good.mask, params, (EOS_ID,))
        threads.submit([MaskJob(constraint, ())])
        for answer in threads.take(10.0):
            if isinstance(answer, Masked):
                assert answer.outcome == good.mask
                masks += 1
            else:
                end = answer.outcome
    assert masks > 20
    assert not isinstance(end, Grammar)
    assert end.code == "grammar_too_complex"
    [after] = outcomes(threads, ("regex", "b+"))  # by another process
    assert isinstance(after, Grammar)


def test_what_overflows_a_stack_ends_the_checker_alone(threads: GrammarThreads) -> None:
    chain = "root ::= r0\n" + "\n".join(f"r{i} ::= r{i + 1}" for i in range(1500)) + '\nr1500 ::= "a"'
    first, second = outcomes(threads, ("ebnf", chain), ("regex", "a"))
    assert isinstance(first, Grammar) or first.code == "grammar_too_complex"
    assert isinstance(second, Grammar)


def test_time_is_limited(threads: GrammarThreads, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(outcomes(threads, ("regex", "a"))[0], Grammar)
    monkeypatch.setattr(grammar_threads, "COMPILE_S", 0.0)
    [refused] = outcomes(threads, ("regex", "b"))
    assert refused.code == GrammarTooComplexError.code
    monkeypatch.undo()
    assert isinstance(outcomes(threads, ("regex", "b"))[0], Grammar)


def test_without_a_tokenizer_each_grammar_gets_the_reason(tmp_path: Path) -> None:
    threads = GrammarThreads(tmp_path, VOCAB_SIZE, (EOS_ID,))
    [refused] = outcomes(threads, ("regex", "b"))
    assert refused.code == "bad_grammar"
    threads.close()
