"""Random lives of a scheduler under pressure: after every event the books are exact, no plan corrupts memory, every
token is the right one, and in the end nothing is left. The checks are the fake worker's, the fake front's and `check`.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import Any, Literal

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from manylora.runtime.messages import Rejected
from tests.scheduler import fake_grammar
from tests.scheduler.fake_worker import NAN
from tests.scheduler.world import EPOCH, Adapter, World

GRAMMARS = ("1", "2", "5", "9", "b9", f"{fake_grammar.BAD}1", f"{fake_grammar.STUCK}2")
NAMES = ("a", "b", "c", "d")
PATHS = ("pa", "pb", "pc", f"{NAN}-weights")
STEMS = ([], [1, 2, 3], [1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6, 8, 9, 10, 11, 12], list(range(10, 27)))

Guard = Literal["right", "wrong"] | None
guards = st.sampled_from((None, None, None, "right", "wrong"))
ttls = st.sampled_from((None, None, 2.0))
small = st.integers(0, 5)
prompts = st.builds(
    lambda stem, tail: stem + tail, st.sampled_from(STEMS), st.lists(st.integers(0, 3), max_size=4)
)


@st.composite
def request_params(draw: st.DrawFn) -> dict[str, Any]:
    """Sampling parameters as keyword arguments; most requests are plain."""
    max_new = draw(st.integers(0, 9))
    params: dict[str, Any] = {"max_new": max_new, "n": draw(st.sampled_from((1, 1, 1, 2, 3)))}
    if draw(small) == 0:
        params |= {"temperature": 1.0, "seed": draw(st.integers(0, 2**63 - 1))}
    if draw(small) == 0:
        params["frequency_penalty"] = 0.5
    if draw(small) == 0:
        params["min_new_tokens"] = draw(st.integers(0, max_new))
    if draw(small) == 0:
        params["ignore_eos"] = True
    if draw(small) == 0:
        params["stop_token_ids"] = [3, 11, 19]
    if draw(small) == 0:
        params["logit_bias"] = {draw(st.integers(0, 39)): -1.5, 3: 2.0}
    if draw(small) <= 1:
        params["regex"] = draw(st.sampled_from(GRAMMARS))
    if draw(small) <= 1:
        params |= {"num_top": draw(st.integers(0, 2)), "logprob_start_len": draw(st.integers(-1, 6))}
    return params


class SchedulerMachine(RuleBasedStateMachine):
    world: World

    def __init__(self) -> None:
        super().__init__()
        self.resident_pins: set[int] = set()
        self.deadlines: list[tuple[float, int]] = []  # of unloads, with the record they are of

    @initialize(
        page_size=st.sampled_from((1, 2, 4)),
        num_pages=st.integers(9, 30),
        num_host_pages=st.integers(3, 8),
        num_slices=st.integers(2, 6),
        max_loras=st.integers(1, 3),
        max_loaded=st.sampled_from((None, 1, 2)),
        max_running=st.integers(1, 6),
        chunk=st.integers(3, 16),
        tp_size=st.sampled_from((1, 2)),
        overlap=st.booleans(),
        radix=st.sampled_from((True, True, False)),
        quota=st.sampled_from((None, None, 24)),
        pinned=st.booleans(),
        sizes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 2)), min_size=4, max_size=4),
    )
    def start(self, quota: int | None, pinned: bool, sizes: list[tuple[int, int]], **shape: Any) -> None:
        files = {path: Adapter(*size) for path, size in zip(PATHS, sizes, strict=True)}
        self.world = World(**shape, max_total_tokens=quota, files=files)
        self.world.load_now("a", "pa", pinned=pinned)
        self.world.load_now("b", "pb")

    # ---- requests ---------------------------------------------------------------------------------------------

    @rule(
        prompt=prompts.filter(bool),
        lora=st.sampled_from((None, "a", "b", "a", "b", *NAMES)),
        params=request_params(),
    )
    def submit(self, prompt: list[int], lora: str | None, params: dict[str, Any]) -> None:
        self._submit(prompt, lora, params)

    @rule(
        prompt=st.sampled_from(STEMS[1:]),
        loras=st.lists(st.sampled_from((None, "a", "b", *NAMES)), min_size=2, max_size=6),
        params=request_params(),
    )
    def submit_burst(self, prompt: list[int], loras: list[str | None], params: dict[str, Any]) -> None:
        for lora in loras:
            self._submit(prompt, lora, params)

    def _submit(self, prompt: list[int], lora: str | None, params: dict[str, Any]) -> None:
        known = lora is None or lora in self.world.names
        sequences = self.world.submit(prompt, lora=lora, **params)
        if params.get("regex") is None:
            assert known or all(isinstance(s.finish, Rejected) for s in sequences)

    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        live = [s for s in self.world.sequences.values() if not s.ended]
        if live:
            self.world.abort(*data.draw(st.lists(st.sampled_from(live), max_size=3, unique_by=id)))

    @rule()
    def flush(self) -> None:
        live = any(not s.ended for s in self.world.sequences.values())
        assert (self.world.flush().error is not None) == live

    # ---- adapters ---------------------------------------------------------------------------------------------

    @rule(
        name=st.sampled_from(NAMES),
        path=st.sampled_from(PATHS),
        pinned=st.sampled_from((False, False, True)),
        replace=st.booleans(),
        ttl_s=ttls,
        guard=guards,
    )
    def load(
        self, name: str, path: str, pinned: bool, replace: bool, ttl_s: float | None, guard: Guard
    ) -> None:
        if_version, wrong = self._guarded(name, guard)
        call = self.world.load(name, path, pinned=pinned, replace=replace, if_version=if_version, ttl_s=ttl_s)
        assert not wrong or call.reply.error.code == "version_conflict"

    @rule(name=st.sampled_from(NAMES), drain_s=st.sampled_from((None, None, 0.0, 3.0)), guard=guards)
    def unload(self, name: str, drain_s: float | None, guard: Guard) -> None:
        version = self.world.names.get(name)
        if_version, wrong = self._guarded(name, guard)
        call = self.world.unload(name, drain_s=drain_s, if_version=if_version)
        if version is None:
            assert drain_s is not None or call.reply.error is not None
        elif wrong:
            assert call.reply.error.code == "version_conflict"
        elif drain_s is not None:
            self.deadlines.append((self.world.now + drain_s, self.world.front.records[version]))

    @rule(name=st.sampled_from(NAMES), pinned=st.sampled_from((None, True, False)), ttl_s=ttls, guard=guards)
    def update(self, name: str, pinned: bool | None, ttl_s: float | None, guard: Guard) -> None:
        known = name in self.world.names
        if_version, wrong = self._guarded(name, guard)
        reply = self.world.update(name, pinned=pinned, ttl_s=ttl_s, if_version=if_version).reply
        if not known:
            assert reply.error.code == "adapter_not_found"
        elif wrong:
            assert reply.error.code == "version_conflict"
        else:
            assert reply.error is None or (pinned and reply.error.code == "adapter_limit")

    def _guarded(self, name: str, guard: Guard) -> tuple[int | None, bool]:
        """`if_version` for a call, and whether it is wrong."""
        version = self.world.names.get(name, 0)
        return {None: (None, False), "right": (version, False), "wrong": (version + 1, True)}[guard]

    @rule(seconds=st.sampled_from((0.5, 1.0, 4.0)))
    def pass_time(self, seconds: float) -> None:
        world = self.world
        world.pass_time(seconds)
        over = {record for deadline, record in self.deadlines if deadline <= world.now}
        live = [s for s in world.sequences.values() if not s.ended]
        assert not [s for s in live if world.front.records.get(s.bound_to) in over]
        for adapter in world.state().adapters:
            idle_s = EPOCH + world.now - max(adapter.last_use, adapter.loaded_at)
            loading = any(
                call.kind == "load" and call.name == adapter.lora_name and not call.answered
                for call in world.calls.values()
            )
            assert adapter.ttl_s is None or idle_s < adapter.ttl_s or loading, "it should have gone"

    @rule(path=st.sampled_from(PATHS[:3]))
    def change_file(self, path: str) -> None:
        self.world.files[path].edition += 1

    @precondition(lambda self: self.world.jobs)
    @rule(data=st.data(), fail=small, careless=st.booleans())
    def finish_job(self, data: st.DataObject, fail: int, careless: bool) -> None:
        index = data.draw(st.integers(0, len(self.world.jobs) - 1))
        self.world.finish_job(index, fail=fail == 0, careless=careless)

    @precondition(lambda self: self.world.jobs)
    @rule(small=small)
    def lose_loader(self, small: int) -> None:
        if small == 0:
            self.world.lose_loader()

    @precondition(lambda self: self.world.acks())
    @rule(data=st.data(), fail=st.integers(0, 9))
    def ack(self, data: st.DataObject, fail: int) -> None:
        index = data.draw(st.integers(0, len(self.world.acks()) - 1))
        self.world.ack(index, fail=fail == 0)

    @precondition(lambda self: self.world.acks())
    @rule()
    def ack_all(self) -> None:
        while self.world.acks():
            self.world.ack()

    @precondition(lambda self: self.world.grammar_jobs)
    @rule(data=st.data(), fail=st.integers(0, 19))
    def finish_grammar_job(self, data: st.DataObject, fail: int) -> None:
        index = data.draw(st.integers(0, len(self.world.grammar_jobs) - 1))
        self.world.finish_grammar_job(index, fail=fail == 0)

    @precondition(lambda self: self.world.grammar_jobs)
    @rule()
    def finish_grammar_jobs(self) -> None:
        while self.world.grammar_jobs:
            self.world.finish_grammar_job()

    # ---- steps ------------------------------------------------------------------------------------------------

    @rule()
    def schedule(self) -> None:
        self.world.schedule()

    @precondition(lambda self: self.world.worker.flights)
    @rule()
    def complete_step(self) -> None:
        self.world.complete_step()

    @rule(count=st.integers(2, 8))
    def steps(self, count: int) -> None:
        for _ in range(count):
            self.world.step()
            self.world.scheduler.check()

    # ---- what must hold ---------------------------------------------------------------------------------------

    @invariant()
    def books_are_exact(self) -> None:
        self.world.scheduler.check()
        assert self.world.worker.max_rows <= self.world.max_running
        assert len(self.world.worker.flights) <= (2 if self.world.overlap else 1)

    @invariant()
    def pins_stay_resident(self) -> None:
        adapters = self.world.state().adapters
        resident = {adapter.version for adapter in adapters if adapter.pinned and adapter.tier == "resident"}
        assert self.resident_pins & {adapter.version for adapter in adapters if adapter.pinned} <= resident
        self.resident_pins = resident

    @invariant()
    def adapters_are_told_as_they_are(self) -> None:
        world, records = self.world, self.world.front.records
        live, tokens = Counter[int](), Counter[int]()
        for sequence in world.sequences.values():
            if (record := records.get(sequence.bound_to)) is not None:
                live[record] += not sequence.ended
                tokens[record] += sequence.generated
        for adapter in world.state().adapters:
            assert world.names[adapter.lora_name] == adapter.version
            record = records[adapter.version]
            versions = [version for version, of in records.items() if of == record]
            assert adapter.running + adapter.waiting == live[record] >= adapter.leases
            assert (adapter.requests, adapter.tokens) == (world.requests[record], tokens[record])
            assert adapter.hits == world.hits[record]
            assert adapter.loads == sum(world.copies[version] for version in versions)
            left = adapter.loads - adapter.evictions
            assert left == (adapter.tier == "resident") or (len(versions) > 1 and left >= 0)

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.settle(limit=3000)
            self.world.assert_nothing_left()


def run_machine(examples: int, steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        SchedulerMachine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=(
                HealthCheck.too_slow,
                HealthCheck.data_too_large,
                HealthCheck.filter_too_much,
            ),
            derandomize="MANYLORA_RANDOM" not in os.environ,
            database=None,
        ),
    )


def test_random_lives() -> None:
    run_machine(examples=400, steps=30)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_many_random_lives() -> None:
    run_machine(examples=4000, steps=60)
