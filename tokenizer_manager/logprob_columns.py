"""The logprobs of one sequence's prompt or answer, kept as packed columns until someone asks for triples."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from manylora.runtime.messages import LogprobChunk, unpack_f32, unpack_i32
from manylora.tokenizer_manager.answer import TokenLogprob


class LogprobColumns:
    """Grows by `LogprobChunk`s. The top columns are (count, num_top), empty if none were wanted."""

    __slots__ = ("_ids", "_logprobs", "_top_ids", "_top_logprobs")

    def __init__(self) -> None:
        self._ids = array("i")
        self._logprobs = array("f")
        self._top_ids = array("i")
        self._top_logprobs = array("f")

    def __len__(self) -> int:
        """Tokens."""
        return len(self._ids)

    def extend(self, chunk: LogprobChunk) -> None:
        self._ids.extend(unpack_i32(chunk.token_ids))
        self._logprobs.extend(unpack_f32(chunk.logprobs))
        self._top_ids.extend(unpack_i32(chunk.top_ids))
        self._top_logprobs.extend(unpack_f32(chunk.top_logprobs))

    def truncate(self, count: int) -> None:
        """Keep the first `count` tokens."""
        num_top = self._num_top()
        del self._ids[count:], self._logprobs[count:]
        del self._top_ids[count * num_top :], self._top_logprobs[count * num_top :]

    def tokens(
        self, pieces: Sequence[bytes] | None, first: int | None = None, *, start: int = 0
    ) -> list[TokenLogprob]:
        """One triple per token from `start` on. `pieces`: for the text, None leaves it null. `first`: a token before all
        others, which has no logprob because nothing predicted it.
        """
        triples = _triples(self._logprobs[start:], self._ids[start:], pieces)
        return triples if first is None else [(None, first, _text(pieces, first)), *triples]

    def tops(
        self, pieces: Sequence[bytes] | None, first: int | None = None, *, start: int = 0
    ) -> list[list[TokenLogprob] | None]:
        """Per token from `start` on its best candidates, best first; null for `first`."""
        num_top = self._num_top()
        skip = start * num_top
        triples = _triples(self._top_logprobs[skip:], self._top_ids[skip:], pieces)
        rows: list[list[TokenLogprob] | None] = [] if first is None else [None]
        rows.extend(triples[i * num_top : (i + 1) * num_top] for i in range(len(self) - start))
        return rows

    def _num_top(self) -> int:
        return len(self._top_ids) // len(self._ids) if self._ids else 0


def _triples(logprobs: array[float], ids: array[int], pieces: Sequence[bytes] | None) -> list[TokenLogprob]:
    return [(value, token, _text(pieces, token)) for value, token in zip(logprobs, ids, strict=True)]


def _text(pieces: Sequence[bytes] | None, token: int) -> str | None:
    if pieces is None:
        return None
    return pieces[token].decode("utf-8", "replace") if token < len(pieces) else ""
