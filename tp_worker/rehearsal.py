"""Steps of every kind, run once before a worker is ready, so that no kernel is compiled while it serves.

Kernels differ by what the host chooses them by: how many tokens and rows a step has, whether prompts are long, whether
any row has an adapter, how tokens are drawn.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from manylora.runtime.plan import ForwardBatch, PlanBuilder
from manylora.tp_worker.model_runner import ModelRunner

# A step's tokens and rows decide which kernels it takes: one of each range, as their launch code divides them.
_TOKENS = (8, 40, 64, 128, 512, 4096, 40 * 2048)
_ROWS = (1, 40, 300)


@dataclass(frozen=True, slots=True)
class Rehearsal:
    """What steps there can be. slot: takes every row, its pages hold nothing; max_tokens: in a step and in the slot."""

    slot: int
    max_rows: int
    max_tokens: int
    vocab_size: int
    lora: bool

    def plans(self) -> Iterator[ForwardBatch]:
        yield from self._sizes()
        for greedy in (True, False):
            changes = {"penalties": True, "min_new": True, "biases": True, "num_top": 2}
            yield self._plan(0, 0, False, masked=True, greedy=greedy, **changes)

    def plans_to_compile(self) -> Iterator[ForwardBatch]:
        """Steps with all the kernels of `plans`, that take no index from what a kernel wrote: a penalty or a logprob
        does, of the token drawn.
        """
        yield from self._sizes()
        yield self._plan(0, 0, False, greedy=False)

    def _sizes(self) -> Iterator[ForwardBatch]:
        for lora in (False, True) if self.lora else (False,):
            for num_tokens, num_rows in product(_TOKENS, _ROWS):
                if num_rows <= num_tokens <= self.max_tokens and num_rows <= self.max_rows:
                    yield self._plan(num_rows, num_tokens // num_rows, lora)

    def _plan(
        self, num_prompts: int, each: int, lora: bool, masked: bool = False, **drawing: Any
    ) -> ForwardBatch:
        """Prompts of `each` tokens and, of the same number of rows, at least one, one token each."""
        builder = PlanBuilder()
        num_rows = min(self.max_rows, 2 * max(1, num_prompts))
        first = 0
        for row in range(num_rows):
            num_new = each if row < num_prompts else 1
            builder.add("rows", self.slot, 0, num_new, first)
            builder.extend("tokens", [0] * num_new)
            builder.add("samples", row, num_new)
            if masked:
                builder.add_mask(row, b"\xff" * (4 * -(-self.vocab_size // 32)))
            first += num_new
        if lora:  # no adapter is there yet: the first slice of the table is one of nothing
            builder.add("segments", 0, first, 0, 1)
            builder.add("slices", 0)
        return builder.build(
            0,
            num_prefill_rows=num_prompts,
            num_prefill_tokens=num_prompts * each,
            max_kv_len=max(1, each),
            max_slices=int(lora),
            **drawing,
        )


def rehearse(runner: ModelRunner, plans: Iterable[ForwardBatch]) -> None:
    """Run them all, and wait for the device."""
    for plan in plans:
        runner.execute(plan)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
