"""What the front counts and times of requests, as plain numbers: whoever publishes them reads them here.

A *request* is one sequence: each sample of each prompt counts. Nothing is done per token: the tokens of a step are one
addition, and sequences whose last token came at the same moment are one observation.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable

from manylora.runtime.messages import Start
from manylora.tokenizer_manager.answer import Aborted, FinishReason, Length, Stop
from manylora.tokenizer_manager.sequence import Sequence

FINISH_REASONS = ("stop", "length", "abort", "error")
_REASON_OF: dict[type[FinishReason], str] = {Stop: "stop", Length: "length", Aborted: "abort"}

# Upper bounds of buckets, in seconds or tokens.
FIRST_TOKEN_S = (0.005, 0.01, 0.02, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 0.75, 1, 2.5, 5, 10, 20, 40, 80, 160)
NEXT_TOKEN_S = (
    *(0.001, 0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05),
    *(0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1, 2.5),
)
WHOLE_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 15, 20, 30, 45, 60, 120, 240, 480, 960)
QUEUE_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 80, 160)
LENGTHS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Histogram:
    """counts[i]: observations above bounds[i - 1] and at most bounds[i]; the last is of those above all bounds."""

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, count: int = 1) -> None:
        """The same value, seen `count` times."""
        self.counts[bisect_left(self.bounds, value)] += count
        self.sum += value * count


class RequestMetrics:
    """Only counts up. Called by `TokenizerManager` alone, in its event loop; `clock` is that of `Sequence.started_at`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """As if nothing had been: for the end of the warm-up."""
        self.prompt_tokens = 0
        self.cached_tokens = 0  # of the prompt tokens, those found in the prefix cache
        self.generated_tokens = 0
        self.finished: dict[str, int] = dict.fromkeys(FINISH_REASONS, 0)
        self.rejected: Counter[str] = Counter()  # by the error's code
        self.failed: Counter[str] = Counter()  # by the error's code
        self.first_token_s = Histogram(FIRST_TOKEN_S)
        self.next_token_s = Histogram(NEXT_TOKEN_S)
        self.whole_s = Histogram(WHOLE_S)
        self.queue_s = Histogram(QUEUE_S)
        self.prompt_length = Histogram(LENGTHS)
        self.generated_length = Histogram(LENGTHS)

    def start(self, sequence: Sequence, start: Start) -> None:
        """The scheduler let it in, and its first token is here."""
        self.prompt_tokens += sequence.num_prompt_tokens
        self.cached_tokens += start.cached_tokens
        self.queue_s.observe(start.queue_s)
        self.first_token_s.observe(self._clock() - sequence.started_at)

    def add_tokens(self, num_tokens: int, receivers: Iterable[Sequence]) -> None:
        """A step's tokens; each receiver got one or more of them."""
        now = self._clock()
        self.generated_tokens += num_tokens
        since: dict[float, int] = {}
        for sequence in receivers:
            before = sequence.token_at
            sequence.token_at = now
            since[before] = since.get(before, 0) + 1
        since.pop(0.0, None)  # first tokens
        for before, count in since.items():
            self.next_token_s.observe(now - before, count)

    def end(self, sequence: Sequence) -> None:
        """It ended by itself, by a stop string, by an error or by `/abort_request`."""
        if sequence.error is not None:
            self.finished["error"] += 1
            self.failed[sequence.error.info().code] += 1
            return
        assert sequence.finish is not None
        reason = _REASON_OF[type(sequence.finish)]
        self.finished[reason] += 1
        if reason != "abort":  # how long it took says something only of what was left to end
            self.whole_s.observe(self._clock() - sequence.started_at)
            self.prompt_length.observe(sequence.num_prompt_tokens)
            self.generated_length.observe(len(sequence.output_ids))

    def leave(self, count: int) -> None:
        """Nobody waits for these sequences any more; they had not ended."""
        self.finished["abort"] += count

    def reject(self, code: str, count: int) -> None:
        """The scheduler refused a call of so many sequences."""
        self.rejected[code] += count
