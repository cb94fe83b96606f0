"""Compiles grammars of strangers before anything else does, in a process that may be killed.

    python -m manylora.scheduler.grammar_checker <tokenizer directory> <vocabulary size> <JSON list of end tokens>

It reads a `Question` per line and answers with a line: first that it is ready, then a `Verdict` each. Conversion runs in
Python and compilation in a library, and either may take what it likes: whoever asks sets the time, and this process limits
its own memory and the depth of its stack, both to less than the asker has.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from manylora.runtime.errors import BadGrammarError, ErrorInfo, GrammarTooComplexError, ManyloraError
from manylora.scheduler.guidance import GuidanceTokenizer

MEMORY_BYTES = 256 << 20
_STACK_BYTES = 4 << 20
# So much space between two tokens of JSON is layout; a model that finds nothing better to write would go on for ever.
_WRITING = {"whitespace_pattern": r"[\x20\x0A\x0D\x09]{1,32}"}
_ESCAPE = re.compile(r"\\(?:u([0-9A-Fa-f]{4})|U([0-9A-Fa-f]{8})|.)", re.DOTALL)


class Question(msgspec.Struct, frozen=True):
    kind: str
    text: str


class Verdict(msgspec.Struct, frozen=True):
    """`grammar`: the same in llguidance's form, which compiles; or why not."""

    grammar: str = ""
    error: ErrorInfo | None = None


def guidance_form(kind: str, text: str) -> str:
    """A grammar of our three kinds in llguidance's form. Raises BadGrammarError or GrammarTooComplexError."""
    try:
        if kind == "json_schema":
            return _json_form(text)
        if kind == "regex":
            return LLMatcher.grammar_from_regex(text)
        return LLMatcher.grammar_from_lark(
            text if is_lark_syntax(text) else gbnf_to_lark(_plain_escapes(text))
        )
    except RecursionError:
        raise GrammarTooComplexError(f"{kind} is nested too deeply.") from None
    except ManyloraError:
        raise
    except Exception as error:  # the converter raises bare Exception
        raise BadGrammarError(f"{kind} is malformed: {error}") from None


def check(tokenizer: GuidanceTokenizer, question: Question) -> Verdict:
    """Compile it and take the first step."""
    try:
        grammar = guidance_form(question.kind, question.text)
        tokenizer.compile(grammar).mask()
    except ManyloraError as error:
        return Verdict(error=error.info())
    return Verdict(grammar)


def _plain_escapes(text: str) -> str:
    """GBNF with every \\u and \\U escape as the character itself, or as \\x where that could mean something else."""

    def plain(match: re.Match[str]) -> str:
        if (digits := match[1] or match[2]) is None:
            return match[0]
        code = int(digits, 16)
        if not 0 < code < 0x110000 or 0xD800 <= code < 0xE000:
            raise BadGrammarError(f"ebnf is malformed: {match[0]} is no character.")
        return chr(code) if code >= 0xA0 else f"\\x{code:02x}"

    return _ESCAPE.sub(plain, text)


def _json_form(text: str) -> str:
    schema: object = json.loads(text)
    if isinstance(schema, bool):
        return LLMatcher.grammar_from_json_schema(json.dumps(schema))
    if isinstance(schema, dict):
        fields = cast("dict[str, Any]", schema)
        options = fields.get("x-guidance", _WRITING)  # llguidance's own key, for those who know it
        return LLMatcher.grammar_from_json_schema({**fields, "x-guidance": options})
    raise BadGrammarError("json_schema must be the JSON text of an object or a boolean.")


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _in_small_stack(work: Callable[[], None]) -> None:
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


def main(directory: str, vocab_size: str, eos_ids: str) -> None:
    tokenizer = GuidanceTokenizer(directory, int(vocab_size), msgspec.json.decode(eos_ids, type=list[int]))
    _limit_memory()

    def serve() -> None:
        _say(Verdict())
        for line in sys.stdin.buffer:
            _say(check(tokenizer, msgspec.json.decode(line, type=Question)))

    _in_small_stack(serve)


def _say(verdict: Verdict) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(verdict) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    main(*sys.argv[1:])
