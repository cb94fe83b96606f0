"""Times one batch from outside: when its last row began to answer, and how long a step takes while all rows decode."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass

from bench_common import Adapters, greedy

from manylora import Engine


@dataclass(slots=True)
class BatchTimes:
    """first_tokens_s: from the call to the last row's first token.

    The window lasts from there to the first finish. Both ends are moments at which the same row's tokens arrived, so
    that a front that lags shifts them alike; `steps` are the tokens that row got in between.
    """

    first_tokens_s: float
    window_s: float = 0.0
    steps: int = 0
    context: float = 0.0  # mean tokens of a row in the window, its prompt included

    @property
    def step_ms(self) -> float:
        """Raises ValueError if some row ended before the last had begun."""
        if self.steps == 0:
            raise ValueError("no step in which all rows decoded: ask for more new tokens or fewer rows")
        return 1e3 * self.window_s / self.steps


def time_first_tokens(
    engine: Engine, prompts: Sequence[Sequence[int]], adapters: Adapters, new_tokens: int
) -> float:
    """Seconds until every prompt has a token, while those that began go on; then everything is aborted."""
    return _time(engine, prompts, adapters, new_tokens, until_first_tokens=True).first_tokens_s


def time_batch(
    engine: Engine, prompts: Sequence[Sequence[int]], adapters: Adapters, new_tokens: int
) -> BatchTimes:
    """Run prompts of one length together until the first has all its `new_tokens`, then abort the rest."""
    return _time(engine, prompts, adapters, new_tokens, until_first_tokens=False)


def _time(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    adapters: Adapters,
    new_tokens: int,
    *,
    until_first_tokens: bool,
) -> BatchTimes:
    num_tokens = [0] * len(prompts)
    num_silent = len(prompts)
    times: BatchTimes | None = None
    opened_at, last_row, opened_with, first_total = 0.0, 0, 0, 0
    started_at = time.perf_counter()
    stream = engine.generate(
        input_ids=prompts, sampling_params=greedy(new_tokens), lora_path=adapters, stream=True
    )
    with contextlib.closing(stream):
        for answer in stream:
            now, row = time.perf_counter(), answer["index"]
            before, num_tokens[row] = num_tokens[row], answer["meta_info"]["completion_tokens"]
            num_silent -= before == 0 and num_tokens[row] > 0
            if times is None and num_silent == 0:
                times = BatchTimes(now - started_at)
                opened_at, last_row, opened_with, first_total = now, row, num_tokens[row], sum(num_tokens)
                if until_first_tokens:
                    break
            elif times is not None and row == last_row:
                times.window_s, times.steps = now - opened_at, num_tokens[row] - opened_with
                generated = (first_total + sum(num_tokens)) / 2 / len(prompts)
                times.context = len(prompts[0]) + generated
            if answer["meta_info"]["finish_reason"] is not None:
                break
    return times or BatchTimes(float("nan"))
