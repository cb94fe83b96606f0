"""Token ids to text as they arrive, never showing half a character."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

_make_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class IncrementalDecoder:
    """The text of one growing list of ids.

    What `feed` returns, put together, plus a last `flush`, is exactly `Tokenizer.decode` of all ids: the bytes of a
    character that is not complete yet stay inside.
    """

    __slots__ = ("_decoder", "_known", "_pieces")

    def __init__(self, pieces: Sequence[bytes]) -> None:
        """`pieces`: the bytes of each id (`Tokenizer.pieces` or `Tokenizer.visible_pieces`)."""
        self._pieces = pieces
        self._known = len(pieces)
        self._decoder = _make_utf8_decoder("replace")

    @property
    def in_character(self) -> bool:
        """The last token ended in the middle of a character."""
        return bool(self._decoder.getstate()[0])

    def feed(self, token: int) -> str:
        """The text that `token` completes."""
        return self._decoder.decode(self._pieces[token]) if token < self._known else ""

    def flush(self) -> str:
        """At the end: U+FFFD for a character that was never completed, else nothing."""
        return self._decoder.decode(b"", final=True)
