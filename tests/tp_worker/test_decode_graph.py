"""Decode graphs on the CPU, where a replay runs the captured step once more: what goes into a graph, and what comes out."""

from __future__ import annotations

from pathlib import Path

import pytest

from manylora.runtime.messages import unpack_i32
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.decode_graph import DecodeResult
from manylora.tp_worker.model_runner import ModelRunner
from tests.reference import Reference
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.fake_graphs import run_again_instead
from tests.tp_worker.plan_driver import Driver, build_runner, run, with_graphs

PROMPT = [0, 17, 43, 99, 250, 17, 8, 301, 64, 17, 120]
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(temperature=1.1, seed=12, repetition_penalty=1.2, min_new_tokens=3)


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch, model_dir: Path) -> tuple[ModelRunner, list[DecodeResult]]:
    """A runner with graphs, and what their replays have left."""
    results = run_again_instead(monkeypatch).results
    return with_graphs(build_runner(model_dir)), results


def generate(runner: ModelRunner, params: dict[int, SamplingParams], count: int) -> list[list[int]]:
    driver, lengths = Driver(VOCAB_SIZE), {slot: len(PROMPT) - slot for slot in params}
    for slot, each in params.items():
        driver.take_slot(slot, each, PROMPT[: lengths[slot]], stop_ids=[1, 2])
    plans = [driver.plan([(slot, 0, PROMPT[:length]) for slot, length in lengths.items()])]
    for step in range(count - 1):
        if step == 2:  # a slot that is taken while others decode
            driver.take_slot(5, GREEDY, PROMPT)
        plans.append(driver.decode({slot: length + step for slot, length in lengths.items()}))
    return [unpack_i32(run(runner, plan).tokens).tolist() for plan in plans]


@pytest.mark.parametrize("params", [{0: GREEDY}, {0: GREEDY, 1: GREEDY, 4: GREEDY}, {0: GREEDY, 3: SAMPLED}])
def test_a_graph_draws_what_a_step_without_one_draws(
    params: dict[int, SamplingParams],
    graphs: tuple[ModelRunner, list[DecodeResult]],
    model_dir: Path,
) -> None:
    runner, results = graphs
    drawn = generate(runner, params, 9)
    assert len(results) == 8
    assert drawn == generate(build_runner(model_dir), params, 9)
    assert [tokens[0] for tokens in drawn] == Reference(model_dir).generate(None, PROMPT, 9).tokens
    assert len(results[0].logits) == {1: 1, 2: 2, 3: 4}[len(params)]


def test_all_graphs_leave_their_logits_in_the_same_memory(
    graphs: tuple[ModelRunner, list[DecodeResult]],
) -> None:
    runner, results = graphs
    generate(runner, {0: GREEDY}, 2)
    generate(runner, {0: GREEDY, 1: GREEDY, 4: GREEDY}, 2)
    assert len({result.logits.data_ptr() for result in results}) == 1
