"""A step on its way: the draft that planning fills, and the record that waits for the workers' answer."""

from __future__ import annotations

from dataclasses import dataclass, field

from manylora.scheduler.prefix_tree import Node
from manylora.scheduler.sequence import Sequence


@dataclass(slots=True)
class StepDraft:
    """`budget`: tokens this step may still take. Nothing is a promise before the plan is built from it."""

    budget: int
    decode: list[Sequence] = field(default_factory=list[Sequence])
    prefill: list[tuple[Sequence, int]] = field(
        default_factory=list[tuple[Sequence, int]]
    )  # with its new tokens
    entered: list[Sequence] = field(default_factory=list[Sequence])  # those of `prefill` that take a slot
    pages: list[int] = field(
        default_factory=list[int]
    )  # flat entries of the plan's sections `pages` and `copies`
    copies: list[int] = field(default_factory=list[int])
    tails: list[Node] = field(default_factory=list[Node])  # locked sources of copies

    def add_chunk(self, sequence: Sequence) -> None:
        """As much of a sequence's prefill as the budget allows."""
        count = min(self.budget, sequence.prefill_end - sequence.num_planned)
        self.budget -= count
        self.prefill.append((sequence, count))


@dataclass(slots=True)
class StepRecord:
    """Who planned what in a step in flight. A generation that has moved on since makes its part void."""

    step: int
    samples: list[Sequence]  # as the plan's `samples`
    generations: list[int]  # of `samples`
    chunks: list[tuple[Sequence, int, int]]  # (sequence, generation, tokens written when it completes)
    prompt_lps: list[
        tuple[Sequence, int, int, int]
    ]  # (sequence, generation, first token, count), as the plan's
    num_top: int
    num_prompt_top: int
