"""A call whose sequences the scheduler has: what one waiting coroutine sleeps on.

There is no queue: sequences hold their newest state, and a slow reader finds fewer, longer answers.
"""

from __future__ import annotations

import asyncio

from manylora.runtime.errors import ManyloraError
from manylora.tokenizer_manager.answer import Answer
from manylora.tokenizer_manager.sequence import Sequence


class RunningCall:
    """`sequences` in the order of the answers."""

    __slots__ = ("_changed", "_error", "_num_running", "_stream", "_wake", "sequences")

    def __init__(self, sequences: list[Sequence], *, stream: bool) -> None:
        self.sequences = sequences
        self._stream = stream
        self._num_running = len(sequences)
        self._changed: dict[int, Sequence] = {}  # by handle, since the last `changes`
        self._error: ManyloraError | None = None
        self._wake = asyncio.Event()

    def note(self, sequence: Sequence) -> None:
        """`sequence` has something new; never called again once it has ended."""
        if sequence.error is not None:
            self.fail(sequence.error)
        self._num_running -= sequence.ended
        if self._stream:
            self._changed[sequence.handle] = sequence
        if self._stream or self._num_running == 0:
            self._wake.set()

    def fail(self, error: ManyloraError) -> None:
        """End the whole call with `error`; the first one stays."""
        self._error = self._error or error
        self._wake.set()

    async def answers(self) -> list[Answer]:
        """All answers, once all sequences have ended. Raises the call's error as soon as there is one."""
        while self._num_running and self._error is None:
            await self._sleep()
        self._raise_error()
        return [sequence.answer() for sequence in self.sequences]

    async def changes(self) -> list[Answer]:
        """Of a stream: the answers that changed since the last time; none when all have ended. Raises like `answers`."""
        while self._num_running and not self._changed and self._error is None:
            await self._sleep()
        self._raise_error()
        changed, self._changed = self._changed, {}
        return [sequence.answer() for sequence in changed.values()]

    async def _sleep(self) -> None:
        self._wake.clear()
        await self._wake.wait()

    def _raise_error(self) -> None:
        if self._error is not None:
            raise self._error
