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
# With many adapters, which the LoRA kernels tell from few: of few chunks, and of many; both behind our own product.
_TOKENS_OF_MANY = (32, 64)
_FEW_ROWS = (10, 20)  # of one token and as many more: between the powers of two of the products' kernels


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
            yield self._plan([], False, masked=True, greedy=greedy, **changes)

    def plans_to_compile(self) -> Iterator[ForwardBatch]:
        """Steps with all the kernels of `plans`, that take no index from what a kernel wrote: a penalty or a logprob
        does, of the token drawn.
        """
        yield from self._sizes()
        yield self._plan([], False, greedy=False)

    def _sizes(self) -> Iterator[ForwardBatch]:
        for lora in (False, True) if self.lora else (False,):
            sizes = sorted({min(num_tokens, self.max_tokens) for num_tokens in _TOKENS})
            for num_tokens, num_rows in product(sizes, _ROWS):
                if num_rows <= num_tokens and num_rows <= self.max_rows:
                    yield self._plan([num_tokens // num_rows] * num_rows, lora)
        for num_rows in _FEW_ROWS:
            if num_rows <= self.max_rows:
                yield self._plan([1] * num_rows, False)
        if self.lora:
            for num_tokens in _TOKENS_OF_MANY:
                dealt = _dealt(min(num_tokens, self.max_tokens), min(num_tokens, self.max_rows))
                yield self._plan(dealt, True, each_its_own=True)

    def _plan(
        self,
        prompts: list[int],
        lora: bool,
        masked: bool = False,
        each_its_own: bool = False,
        **drawing: Any,
    ) -> ForwardBatch:
        """Prompts of so many tokens and, if there are slots left, of the same number of rows, at least one, one token each.

        With LoRA all tokens have one adapter, or every prompt has its own and there are no other rows.
        """
        builder = PlanBuilder()
        num_rows = len(prompts) if each_its_own else min(self.max_rows, 2 * max(1, len(prompts)))
        first = 0
        for row in range(num_rows):
            num_new = prompts[row] if row < len(prompts) else 1
            builder.add("rows", self.slot, 0, num_new, first)
            builder.extend("tokens", [0] * num_new)
            builder.add("samples", row, num_new)
            if masked:
                builder.add_mask(row, b"\xff" * (4 * -(-self.vocab_size // 32)))
            if each_its_own:  # no adapter is there yet: the first slice of the table is one of nothing
                builder.add("segments", first, first + num_new, 0, 1)
            first += num_new
        if lora:
            if not each_its_own:
                builder.add("segments", 0, first, 0, 1)
            builder.add("slices", 0)
        return builder.build(
            0,
            num_prefill_rows=len(prompts),
            num_prefill_tokens=sum(prompts),
            max_kv_len=max(prompts, default=1),
            max_slices=int(lora),
            **drawing,
        )


def _dealt(num_tokens: int, num_rows: int) -> list[int]:
    """Prompts of about the same length, none of them empty."""
    num_rows = min(num_rows, num_tokens)
    each, more = divmod(num_tokens, num_rows)
    return [each + (row < more) for row in range(num_rows)]


def rehearse(runner: ModelRunner, plans: Iterable[ForwardBatch]) -> None:
    """Run them all, and wait for the device."""
    for plan in plans:
        runner.execute(plan)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
