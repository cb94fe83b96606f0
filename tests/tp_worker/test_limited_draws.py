"""Logit biases and masks in a worker: against plain torch on transformers' logits, beside rows that have neither."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from manylora.kernels.sampling import sample, uniform
from manylora.runtime.messages import unpack_f32, unpack_i32
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.model_runner import ModelRunner
from tests.e2e.helpers import ONE_DEVICE
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.plan_driver import Driver, build_runner, run, with_graphs

LogitsOf = Callable[[list[int]], torch.Tensor]
PROMPT = [0, 17, 43, 99, 250, 17, 8, 301, 64, 17, 120]
OTHER = [0, 5, 5, 78, 200, 31]
GREEDY = SamplingParams(temperature=0.0)
BIASED = SamplingParams(temperature=0.0, logit_bias={9: 6.0, 17: -100.0, 300: 5.5})
RANDOM = SamplingParams(temperature=0.9, top_p=0.8, top_k=40, seed=5)
STEPS = 6


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@pytest.fixture(scope="module")
def logits_of(model_dir: Path) -> LogitsOf:
    """Token ids -> (vocab,): what transformers says after the last."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1]

    return logits


@pytest.fixture(params=ONE_DEVICE)
def runner(request: pytest.FixtureRequest, model_dir: Path) -> ModelRunner:
    """On a GPU decode steps are graphs, from whose logits these draws go on."""
    if request.param == "cpu":
        return build_runner(model_dir)
    return with_graphs(build_runner(model_dir, "cuda"))


def limited(
    logits_of: LogitsOf, params: SamplingParams, prompt: list[int], allowed: list[set[int]]
) -> list[int]:
    """The oracle: `len(allowed)` tokens, each out of its own set."""
    ids = list(prompt)
    for choice in allowed:
        logits = logits_of(ids).clone()
        for token, bias in (params.logit_bias or {}).items():
            logits[token] += bias
        forbidden = [token for token in range(VOCAB_SIZE) if token not in choice]
        logits[forbidden] = -torch.inf
        ids.append(int(logits.argmax()) if params.greedy else drawn(logits, params, len(ids)))
    return ids[len(prompt) :]


def drawn(logits: torch.Tensor, params: SamplingParams, position: int) -> int:
    numbers = (params.seed or 0, 0, 0, position)
    uniforms = uniform(*(torch.tensor([number]) for number in numbers))
    top_k = VOCAB_SIZE if params.top_k == -1 else params.top_k
    temperature, top_p, min_p = (
        torch.tensor([value]) for value in (params.temperature, params.top_p, params.min_p)
    )
    return int(sample(logits[None], temperature, torch.tensor([top_k]), top_p, min_p, uniforms))


def choices(seed: int, size: int) -> list[set[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [set(torch.randperm(VOCAB_SIZE, generator=generator)[:size].tolist()) for _ in range(STEPS)]


EVERYTHING = [set(range(VOCAB_SIZE))] * STEPS


def test_a_mixed_batch_draws_what_each_row_draws_alone(runner: ModelRunner, logits_of: LogitsOf) -> None:
    driver = Driver(VOCAB_SIZE)
    rows: dict[int, tuple[SamplingParams, list[int], list[set[int]]]] = {
        0: (GREEDY, PROMPT, EVERYTHING),
        1: (BIASED, PROMPT, EVERYTHING),
        2: (GREEDY, PROMPT, choices(1, 30)),
        3: (RANDOM, OTHER, choices(2, 60)),
        4: (RANDOM, OTHER, EVERYTHING),
        5: (BIASED, OTHER, choices(3, 200)),
    }
    for slot, (params, prompt, _) in rows.items():
        driver.take_slot(slot, params, prompt)
    answers: dict[int, list[int]] = {slot: [] for slot in rows}
    for step in range(STEPS):
        allowed = {slot: sorted(sets[step]) for slot, (_, _, sets) in rows.items() if sets is not EVERYTHING}
        if step == 0:
            plan = driver.plan([(slot, 0, prompt) for slot, (_, prompt, _) in rows.items()], allowed=allowed)
        else:
            starts = {slot: len(prompt) + step - 1 for slot, (_, prompt, _) in rows.items()}
            plan = driver.decode(starts, allowed=allowed)
        for slot, token in zip(rows, unpack_i32(run(runner, plan).tokens), strict=True):
            answers[slot].append(token)
    for slot, (params, prompt, sets) in rows.items():
        assert answers[slot] == limited(logits_of, params, prompt, sets), slot


def test_a_greedy_row_takes_the_biased_best(runner: ModelRunner, logits_of: LogitsOf) -> None:
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(2, SamplingParams(temperature=0.0, logit_bias={78: 100.0}), PROMPT)
    plan = driver.plan([(2, 0, PROMPT)])
    assert list(unpack_i32(run(runner, plan).tokens)) == [78]
    assert int(logits_of(PROMPT).argmax()) != 78


def test_a_slot_forgets_the_biases_of_the_sequence_before(runner: ModelRunner, logits_of: LogitsOf) -> None:
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(2, SamplingParams(temperature=0.0, logit_bias={78: 100.0, 5: 3.0}), PROMPT)
    run(runner, driver.plan([(2, 0, PROMPT)]))
    driver.take_slot(2, GREEDY, OTHER)
    driver.take_slot(3, BIASED, OTHER)
    output = run(runner, driver.plan([(2, 0, OTHER), (3, 0, OTHER)]))
    plain, biased = unpack_i32(output.tokens)
    assert plain == int(logits_of(OTHER).argmax())
    assert biased == limited(logits_of, BIASED, OTHER, EVERYTHING[:1])[0]


def test_logprobs_are_of_the_models_own_logits(runner: ModelRunner, logits_of: LogitsOf) -> None:
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(1, BIASED, PROMPT)
    output = run(runner, driver.plan([(1, 0, PROMPT)], num_top=2, allowed={1: [40, 41]}))
    expected = torch.log_softmax(logits_of(PROMPT), 0)
    (token,) = unpack_i32(output.tokens)
    assert token in (40, 41)
    assert list(unpack_f32(output.logprobs)) == pytest.approx([expected[token].item()], abs=1e-4)
    assert list(unpack_i32(output.top_ids)) == expected.topk(2).indices.tolist()


def test_a_mask_hides_no_logits_that_are_not_finite(runner: ModelRunner) -> None:
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(1, GREEDY, PROMPT)
    runner._pool.elements.fill_(torch.nan)
    model: Any = runner._model
    with torch.inference_mode():
        model.norm.weight.fill_(torch.nan)
    output = run(runner, driver.plan([(1, 0, PROMPT)], allowed={1: [40]}))
    assert list(unpack_i32(output.tokens)) == [-1]
