"""One sequence: its tokens, how far it is planned and known, and where its KV lies.

    tokens      [ prompt ........ | generated, known ]          max_len = prompt_len + max_new_tokens
    KV          [ written ..... | planned ]                     written ≤ planned
    pages       [ the tree's, locked (nodes) | its own ]

A step is planned before the tokens of the last one are back, so `num_planned` may run ahead of `tokens`. The token of
position p is drawn by the row whose KV ends at p; the last position, max_len - 1, is drawn but never written.
"""

from __future__ import annotations

from array import array
from enum import Enum, auto

import msgspec

from manylora.runtime.messages import NO_VERSION, GenerateReq
from manylora.scheduler.grammar import Constraint
from manylora.scheduler.prefix_tree import Node
from manylora.scheduler.version import Version

# Bits of `Sequence.traits`: what a step must know when such a sequence draws a token.
RANDOM, PENALTIES, LOGPROBS, MIN_NEW, BIASES = 1, 2, 4, 8, 16


class Phase(Enum):
    WAITING = auto()
    RUNNING = auto()
    ENDED = auto()


class Sequence:
    """One sample of one request. Attributes are plain: planner and outputs touch them for every row of every step."""

    __slots__ = (
        "arrival",
        "arrived_at",
        "cached_tokens",
        "capacity",
        "constraint",
        "generation",
        "group",
        "handle",
        "lp_next",
        "lp_sent",
        "max_len",
        "namespace",
        "nodes",
        "num_planned",
        "num_top",
        "num_written",
        "pages",
        "params",
        "phase",
        "prefill_end",
        "prompt_len",
        "queue_s",
        "sample_index",
        "seed",
        "slot",
        "started",
        "stop_ids",
        "tokens",
        "traits",
        "version",
        "version_id",
    )

    def __init__(
        self, request: GenerateReq, sample_index: int, *, arrival: int, seed: int, eos_ids: tuple[int, ...]
    ) -> None:
        params = request.params
        assert params.max_new_tokens is not None
        self.handle = request.handle + sample_index
        self.arrival = arrival  # rising; the order of every queue
        self.params = params
        self.sample_index = sample_index
        self.seed = seed
        self.tokens = array("i", request.input_ids)
        self.prompt_len = len(self.tokens)
        self.max_len = self.prompt_len + params.max_new_tokens
        self.stop_ids = frozenset([*(params.stop_token_ids or ()), *(() if params.ignore_eos else eos_ids)])
        self.num_top = request.num_top
        self.traits = (
            RANDOM * (not params.greedy)
            | PENALTIES * params.has_penalties
            | LOGPROBS * (request.num_top >= 0)
            | MIN_NEW * (params.min_new_tokens > 0)
            | BIASES * bool(params.logit_bias)
        )
        wants_prompt = request.num_top >= 0 and request.logprob_start_len >= 0
        # The next prompt token whose logprob is to be planned, and to be sent.
        self.lp_next = self.lp_sent = request.logprob_start_len + 1 if wants_prompt else self.prompt_len
        self.version: Version | None = None
        self.version_id = NO_VERSION
        self.namespace: int | None = NO_VERSION  # of the prefix tree; None: shares nothing
        self.group: Group | None = None
        self.constraint: Constraint | None = None
        self.phase = Phase.WAITING
        self.generation = 0  # a token planned under an older one is dropped
        self.arrived_at = 0.0  # on the roster's clock
        self.queue_s = -1.0  # from its arrival until it was first admitted
        self.started = False
        self.cached_tokens = -1  # found when first admitted
        self.slot = -1
        self.pages: list[int] = []
        self.nodes: list[Node] = []
        self.capacity = 0  # tokens its pages hold
        self.prefill_end = self.prompt_len  # tokens known when admitted: what prefill has to write
        self.num_planned = 0
        self.num_written = 0  # tokens that prefill has written in completed steps since it was admitted

    def constrain(self, constraint: Constraint) -> None:
        """Have it match a grammar. Its masks see to `min_new_tokens`, so that these can never forbid every token."""
        self.constraint = constraint
        self.params = msgspec.structs.replace(self.params, min_new_tokens=0)
        self.traits &= ~MIN_NEW

    @property
    def may_draw(self) -> bool:
        """Whether what it may draw after its known tokens is known."""
        return self.constraint is None or self.constraint.mask is not None

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def kv_tokens(self) -> int:
        """The most KV it ever writes, in tokens."""
        return max(self.prompt_len, self.max_len - 1)

    @property
    def reuse_limit(self) -> int:
        """Tokens a prefix hit may cover: the last is always computed, and so is what a wanted logprob needs."""
        limit = len(self.tokens) - 1
        return min(limit, self.lp_sent - 1) if self.lp_sent < self.prompt_len else limit

    @property
    def num_valid(self) -> int:
        """Leading tokens whose KV is written and whose ids are known."""
        return max(self.num_written, len(self.tokens) - 1 if len(self.tokens) > self.prefill_end else 0)

    def steps_left(self, chunk_size: int) -> int:
        """Steps still to be planned if nothing holds it up."""
        if self.phase is Phase.RUNNING:
            prefill, end = self.prefill_end - self.num_planned, max(self.num_planned, self.prefill_end)
        else:
            prefill = end = len(self.tokens)
        return -(-max(0, prefill) // chunk_size) + max(0, self.max_len - 1 - end)

    def rewind(self) -> None:
        """Back to waiting: forget what is planned, keep what is known."""
        self.phase = Phase.WAITING
        self.generation += 1
        self.slot = -1
        self.num_planned = self.num_written = self.capacity = 0
        self.lp_next = self.lp_sent


class Group:
    """The n samples of one request. The first computes the prompt; the others wait for it and then hit it."""

    __slots__ = ("computed", "members", "private_namespace")

    def __init__(self, members: list[Sequence], private_namespace: int | None) -> None:
        self.members = members  # those that have not ended
        self.computed = False  # some member's prompt has been written
        self.private_namespace = (
            private_namespace  # its own part of the prefix tree, where prefixes are not shared
        )

    def may_enter(self, sequence: Sequence) -> bool:
        return self.computed or self.members[0] is sequence

    def prompt_source(self) -> Sequence | None:
        """A running member whose whole prompt is written."""
        for member in self.members:
            if member.phase is Phase.RUNNING and member.num_written >= member.prompt_len:
                return member
        return None
