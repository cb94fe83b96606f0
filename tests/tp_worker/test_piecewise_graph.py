"""Pieces of graphs on the CPU, where a replay runs the captured step once more: padding, cuts, and what goes in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manylora.runtime.messages import unpack_i32
from manylora.runtime.plan import ForwardBatch
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.model_runner import ModelRunner
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.fake_graphs import Replays, run_again_instead
from tests.tp_worker.plan_driver import Driver, build_runner, run, with_graphs

PROMPTS = [[0, 17, 43, 99, 250, 17, 8], list(range(5, 45)), [301, 64, 17, 120, 9]]
GREEDY = SamplingParams(temperature=0.0)


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> Replays:
    return run_again_instead(monkeypatch)


def plans() -> list[ForwardBatch]:
    """A short prompt; a long one in two chunks, with decode rows beside them; one with a prompt logprob and a sampled row."""
    driver = Driver(VOCAB_SIZE)
    short, long, last = PROMPTS
    driver.take_slot(2, GREEDY, short)
    made = [driver.plan([(2, 0, short)])]
    driver.take_slot(0, GREEDY, long)
    made.append(driver.plan([(0, 0, long[:33]), (2, len(short), [-1])]))
    made.append(driver.plan([(0, 33, long[33:]), (2, len(short) + 1, [-1])], num_top=2))
    driver.take_slot(4, SamplingParams(temperature=1.2, seed=5, repetition_penalty=1.3), last)
    rows = [(4, 0, last), (0, len(long), [-1]), (2, len(short) + 2, [-1])]
    made.append(driver.plan(rows, prompt_lps=[(1, last[2], 2)]))
    made.append(driver.decode({0: len(long) + 1, 2: len(short) + 3, 4: len(last)}))
    return made


def outputs(runner: ModelRunner) -> list[list[list[float]]]:
    """Tokens and logprobs of every step."""
    found = []
    for plan in plans():
        output = run(runner, plan)
        floats = [output.logprobs, output.top_logprobs, output.prompt_logprobs]
        values = [
            torch.frombuffer(bytearray(one), dtype=torch.float32).tolist() if one else [] for one in floats
        ]
        found.append([unpack_i32(output.tokens).tolist(), *values])
    return found


def test_pieces_compute_what_a_step_without_them_computes(model_dir: Path, replays: Replays) -> None:
    found = outputs(with_graphs(build_runner(model_dir)))
    expected = outputs(build_runner(model_dir))
    for one, other in zip(found, expected, strict=True):
        assert one[0] == other[0]
        for values, wanted in zip(one[1:], other[1:], strict=True):
            torch.testing.assert_close(torch.tensor(values), torch.tensor(wanted))
    assert [len(tokens) for tokens in replays.pieces] == [32, 64, 32, 32]
    assert len(replays.results) == 1, "decode rows alone have graphs of their own"


def test_what_an_earlier_step_left_is_gone(model_dir: Path, replays: Replays) -> None:
    outputs(with_graphs(build_runner(model_dir)))
    assert [tokens[8:].count(0) for tokens in replays.pieces[2:3]] == [32 - 8]
    assert replays.pieces[1][34:] == [0] * 30


def test_longer_steps_have_none(model_dir: Path, replays: Replays) -> None:
    runner = with_graphs(build_runner(model_dir))
    pieces = runner._pieces
    assert pieces is not None
    assert pieces.find(64, 0) is not None
    assert pieces.find(65, 0) is None
    assert pieces.find(3, 17) is None
    assert not replays.pieces
