"""Pieces of graphs with adapters: real ones on a GPU; on the CPU a replay runs the captured step once more.

Three adapters of one, two and four slices and rows without any, in prompts, chunks and decode rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.runtime.messages import unpack_f32, unpack_i32
from manylora.runtime.plan import FROM_SLOT, ForwardBatch, ForwardOutput
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker import piecewise_graph
from manylora.tp_worker.model_runner import ModelRunner
from manylora.tp_worker.piecewise_graph import PiecewiseGraph
from manylora.tp_worker.transfers import RING
from tests.e2e.helpers import ONE_DEVICE
from tests.reference import CLEAR_MARGIN, Answer, Reference, clear_prompts
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.fake_graphs import run_again_instead
from tests.tp_worker.plan_driver import Driver, build_runner, run, with_graphs
from tests.tp_worker.resident_adapters import Adapters

GREEDY = SamplingParams(temperature=0.0)
SLICES = {"r4_qv": [3], "r24_odd": [6, 1], "r64_all": [5, 0, 2, 4]}
# Slot -> the length of its prompt, and its adapter.
SLOTS = {
    0: (40, "r4_qv"),
    1: (13, None),
    2: (7, "r64_all"),
    3: (9, None),
    4: (5, "r24_odd"),
    5: (11, None),
}
Step = list[tuple[int, int]]  # (slot, number of its next tokens), rows of several tokens first
STEPS: list[Step] = [
    [(2, 7), (5, 11)],
    [(0, 33), (2, 1), (5, 1)],
    [(0, 7), (4, 5), (2, 1), (5, 1)],
    [(1, 13), (0, 1)],  # the others' adapters were where the tokens of slot 1 are
    [(3, 9), (5, 1), (1, 1)],
    [(0, 1), (4, 1), (2, 1), (3, 1)],
]
# By how many tokens, and whether with room for adapters; decode rows alone have graphs of their own.
PIECES = [(32, True), (64, True), (32, True), (32, True), (32, False)]
WITH_PROMPT_LOGPROBS = (0, 3)  # of these steps' first rows
NUM_TOKENS = 4  # the most that are drawn in a slot
BFLOAT16_ERROR = 0.1  # relative; without the adapters it is 0.6


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@pytest.fixture(scope="module")
def adapters(tiny_models: TinyModels) -> Adapters:
    return {tiny_models.adapter("llama", kind): slices for kind, slices in SLICES.items()}


@pytest.fixture(scope="module")
def answers(tiny_models: TinyModels, model_dir: Path) -> dict[int, Answer]:
    """What transformers and PEFT make of each slot's prompt."""
    reference, found = Reference(model_dir), {}
    for slot, (length, kind) in SLOTS.items():
        adapter = tiny_models.adapter("llama", kind) if kind else None
        [prompt] = clear_prompts(reference, [adapter], lengths=[length], num_tokens=NUM_TOKENS, seed=slot)
        found[slot] = reference.generate(adapter, prompt, NUM_TOKENS)
    return found


@pytest.fixture(params=ONE_DEVICE)
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "cpu":
        run_again_instead(monkeypatch)
    return request.param


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """The pieces that steps were run by, as in PIECES."""
    found: list[tuple[int, bool]] = []
    run_pieces = PiecewiseGraph.run

    def remember(self: PiecewiseGraph, *args: Any, **kwargs: Any) -> torch.Tensor:
        found.append((self._given.shape[1], self._lora is not None))
        return run_pieces(self, *args, **kwargs)

    monkeypatch.setattr(PiecewiseGraph, "run", remember)
    return found


def plans(
    answers: dict[int, Answer], steps: Sequence[Step] = STEPS, *, forced: bool = False
) -> list[ForwardBatch]:
    """The steps; a row draws once its prompt is complete. forced: and goes on with the answer's tokens, whatever it drew."""
    driver, done = Driver(VOCAB_SIZE), dict.fromkeys(SLOTS, 0)
    slices = {slot: SLICES[kind] for slot, (_, kind) in SLOTS.items() if kind is not None}
    made: list[ForwardBatch] = []
    for index, step in enumerate(steps):
        rows: list[tuple[int, int, Sequence[int]]] = []
        for slot, num_new in step:
            prompt, start = answers[slot].input_ids, done[slot]
            if not start:
                driver.take_slot(slot, GREEDY, prompt)
            known = [*prompt, *answers[slot].tokens] if forced else prompt
            rows.append((slot, start, known[start : start + num_new] or [FROM_SLOT]))
            done[slot] += num_new
        _, first, tokens = rows[0]
        asked = len(tokens) - 1 if index in WITH_PROMPT_LOGPROBS and first == 0 else 0
        made.append(
            driver.plan(
                rows,
                samples=[slot for slot, _ in step if done[slot] >= len(answers[slot].input_ids)],
                num_top=2,
                prompt_lps=[(place, tokens[place + 1], 1) for place in range(asked)],
                adapters=slices,
            )
        )
    return made


def play(
    runner: ModelRunner, answers: dict[int, Answer], steps: Sequence[Step] = STEPS, *, forced: bool = False
) -> list[ForwardOutput]:
    return [run(runner, plan) for plan in plans(answers, steps, forced=forced)]


def assert_close(found: bytes, expected: Sequence[float]) -> None:
    """Logprobs, closer than tokens need."""
    values = torch.tensor(unpack_f32(found))
    torch.testing.assert_close(values, torch.tensor(expected), rtol=0, atol=CLEAR_MARGIN / 4)


@pytest.mark.parametrize("bucket", [None, 384], ids=["decode tiles", "prefill tiles"])
def test_pieces_compute_what_a_step_without_them_computes(
    model_dir: Path,
    adapters: Adapters,
    answers: dict[int, Answer],
    device: str,
    used: list[tuple[int, bool]],
    bucket: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if bucket is not None:  # every step is padded to it; of so many tokens the kernels are others
        monkeypatch.setattr(piecewise_graph, "BUCKETS", (bucket,))
    found = play(with_graphs(build_runner(model_dir, device, adapters)), answers)
    assert used == [(bucket or size, lora) for size, lora in PIECES]
    expected = play(build_runner(model_dir, device, adapters), answers)
    assert len(used) == len(PIECES)
    for one, other in zip(found, expected, strict=True):
        assert unpack_i32(one.tokens) == unpack_i32(other.tokens)
        for column in ("logprobs", "top_logprobs", "prompt_logprobs"):
            assert_close(getattr(one, column), unpack_f32(getattr(other, column)))


def test_pieces_draw_what_peft_draws(
    model_dir: Path, adapters: Adapters, answers: dict[int, Answer], device: str
) -> None:
    outputs = play(with_graphs(build_runner(model_dir, device, adapters)), answers)
    drawn: dict[int, list[int]] = {slot: [] for slot in SLOTS}
    logprobs: dict[int, list[float]] = {slot: [] for slot in SLOTS}
    for step, output in zip(STEPS, outputs, strict=True):
        drawing = [slot for slot, num_new in step if (slot, num_new) != (0, 33)]
        tokens = zip(drawing, unpack_i32(output.tokens), unpack_f32(output.logprobs), strict=True)
        for slot, token, logprob in tokens:
            drawn[slot].append(token)
            logprobs[slot].append(logprob)
    assert {slot: len(tokens) for slot, tokens in drawn.items()} == {0: 3, 1: 2, 2: 4, 3: 2, 4: 2, 5: 4}
    for slot, answer in answers.items():
        count = len(drawn[slot])
        assert drawn[slot] == answer.tokens[:count], SLOTS[slot]
        found = torch.tensor(logprobs[slot])
        expected = torch.tensor(answer.output_logprobs()[:count])
        torch.testing.assert_close(found, expected, rtol=0, atol=CLEAR_MARGIN / 4)
    for index in WITH_PROMPT_LOGPROBS:
        slot, _ = STEPS[index][0]
        assert_close(outputs[index].prompt_logprobs, answers[slot].prompt_logprobs())


def test_bfloat16_stays_close(
    model_dir: Path, adapters: Adapters, answers: dict[int, Answer], device: str
) -> None:
    """On a GPU the base products are then our own kernel's, with the deltas beside them or behind."""

    def top_logprobs(runner: ModelRunner) -> torch.Tensor:
        outputs = play(runner, answers, forced=True)
        return torch.cat([torch.tensor(unpack_f32(output.top_logprobs)) for output in outputs])

    expected = top_logprobs(build_runner(model_dir, adapters=adapters))
    runner = build_runner(model_dir, device, adapters, torch.bfloat16)
    for found in (top_logprobs(runner), top_logprobs(with_graphs(runner))):
        assert (found - expected).norm() < BFLOAT16_ERROR * expected.norm()


def test_the_adapters_of_an_earlier_step_are_gone(
    model_dir: Path, adapters: Adapters, answers: dict[int, Answer], device: str, used: list[tuple[int, bool]]
) -> None:
    """Where three adapters' tokens were, there are then one adapter's, behind those of a prompt without any."""
    runner = with_graphs(build_runner(model_dir, device, adapters))
    play(runner, answers, [[(2, 7), (4, 5), (0, 20)]])
    outputs = play(runner, answers, [[(1, 13), (2, 7)]])
    assert used == [(32, True)] * 2
    assert unpack_i32(outputs[0].tokens).tolist() == [answers[slot].tokens[0] for slot in (1, 2)]
    assert_close(outputs[0].prompt_logprobs, answers[1].prompt_logprobs())


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("by_pieces", [True, False])
def test_a_step_with_adapters_never_waits_for_the_device(
    model_dir: Path,
    adapters: Adapters,
    answers: dict[int, Answer],
    used: list[tuple[int, bool]],
    by_pieces: bool,
) -> None:
    runner = build_runner(model_dir, "cuda", adapters)
    if by_pieces:
        with_graphs(runner)
    expected = play(runner, answers)  # what is made once may wait
    used.clear()
    first = plans(answers)[:RING]
    torch.cuda.set_sync_debug_mode("error")  # whatever waits raises
    try:
        pending = [runner.execute(plan) for plan in first]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert used == (PIECES[:RING] if by_pieces else [])
    found = [one.output() for one in pending if one is not None]
    assert [output.tokens for output in found] == [output.tokens for output in expected[:RING]]
