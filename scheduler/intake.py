"""From a call's requests to sequences, or to the one error that refuses the call."""

from __future__ import annotations

import random

from manylora.runtime.bounds import MAX_STOP_TOKEN_IDS
from manylora.runtime.errors import BadRequestError, ContextLengthError, QueueFullError
from manylora.runtime.messages import NO_VERSION, GenerateReq
from manylora.scheduler.adapter_admin import AdapterAdmin
from manylora.scheduler.adapter_limits import FitChecker
from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.grammar import Constraint, source_of
from manylora.scheduler.grammar_desk import Grammars
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import Group, Sequence
from manylora.scheduler.version import Version


class Intake:
    """`seed` draws the seeds of requests without one."""

    def __init__(
        self,
        roster: Roster,
        adapters: AdapterTable,
        admin: AdapterAdmin,
        fit: FitChecker,
        *,
        context_length: int,
        eos_ids: tuple[int, ...],
        max_queued: int,
        shares_prefixes: bool,
        seed: int,
    ) -> None:
        self._roster = roster
        self._adapters = adapters
        self._admin = admin
        self._fit = fit
        self._context_length = context_length
        self._eos_ids = eos_ids
        self._max_queued = max_queued
        self._shares_prefixes = shares_prefixes
        self._random = random.Random(seed)
        self._num_arrived = 0

    def accept(self, requests: list[GenerateReq], grammars: Grammars, arrived_at: float) -> None:
        """Queue every sequence of a call, whose `grammars` are compiled; raises a ManyloraError, and queues none, if one of
        them cannot be served. arrived_at: when the call did, on the roster's clock."""
        waiting = len(self._roster.waiting)
        count = sum(request.params.n for request in requests)
        if waiting + count > self._max_queued:
            raise QueueFullError(
                f"{waiting} sequences wait already; {count} more exceed the limit of {self._max_queued}."
            )
        self._admin.check_requested({r.lora_name for r in requests if r.lora_name is not None})
        accepted: list[tuple[Sequence, Version | None]] = []
        for request in requests:
            version = self._adapters.names[request.lora_name] if request.lora_name is not None else None
            accepted += [(sample, version) for sample in self._samples(request, version, grammars)]
        for request in requests:
            if request.lora_name is not None:
                self._adapters.count_request(self._adapters.names[request.lora_name])
        for sequence, version in accepted:
            self._roster.add(sequence, version, arrived_at)

    def _samples(self, request: GenerateReq, version: Version | None, grammars: Grammars) -> list[Sequence]:
        params = request.params
        seed = params.seed if params.seed is not None else params.sampling_seed
        if seed is None:
            seed = self._random.getrandbits(63)
        samples = [
            Sequence(request, index, arrival=self._num_arrived + index, seed=seed, eos_ids=self._eos_ids)
            for index in range(params.n)
        ]
        self._check(samples[0], version)
        self._num_arrived += params.n
        self._assign_namespace(samples, version)
        if (source := source_of(params)) is not None:
            grammar = grammars[source]
            for sample in samples:
                matcher = grammar.matcher.copy()
                sample.constrain(Constraint(sample.handle, matcher, grammar.mask, params, self._eos_ids))
        return samples

    def _assign_namespace(self, samples: list[Sequence], version: Version | None) -> None:
        """Where the samples look for prefixes: among all of their version, or where nothing is shared, among themselves."""
        several = len(samples) > 1
        namespace = version.id if version else NO_VERSION
        if not self._shares_prefixes:
            namespace = -1 - samples[0].arrival if several else None
        group = Group(samples, None if self._shares_prefixes else namespace) if several else None
        for sample in samples:
            sample.namespace, sample.group = namespace, group

    def _check(self, sequence: Sequence, version: Version | None) -> None:
        if not sequence.tokens:
            raise BadRequestError("input_ids cannot be empty.", param="input_ids")
        if sequence.max_len > self._context_length:
            raise ContextLengthError(
                f"The request has {sequence.prompt_len} prompt tokens and asks for "
                f"{sequence.max_len - sequence.prompt_len} new ones; the context holds {self._context_length}."
            )
        if len(sequence.stop_ids) > MAX_STOP_TOKEN_IDS:
            raise BadRequestError(
                f"stop_token_ids and the model's end tokens are {len(sequence.stop_ids)}; "
                f"at most {MAX_STOP_TOKEN_IDS} are possible.",
                param="sampling_params.stop_token_ids",
            )
        self._fit.check_sequence(sequence, version, self._adapters.pinned)
