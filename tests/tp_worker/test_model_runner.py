"""The runner on hand-built plans over a real tiny model, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import transformers

from manylora.kernels.sampling import sample, uniform
from manylora.runtime.messages import unpack_f32, unpack_i32
from manylora.runtime.plan import ForwardOutput
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker import model_runner
from manylora.tp_worker.logprobs import select_logprobs
from manylora.tp_worker.model_runner import Model, ModelRunner
from tests.reference import Reference
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.plan_driver import Driver, build_runner, run

LogitsOf = Callable[[list[int]], torch.Tensor]
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [0, 17, 43, 99, 250, 17, 8, 301, 64, 17, 120]
OTHER = [0, 5, 5, 77, 200, 31]
LOOPING = [0, 244, 183, 298, 111, 258, 71, 144, 71]


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@pytest.fixture(scope="module")
def reference(model_dir: Path) -> Reference:
    return Reference(model_dir)


@pytest.fixture(scope="module")
def logits_of(model_dir: Path) -> LogitsOf:
    """Token ids -> (tokens, vocab): what transformers says after each."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)

    def logits(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0]

    return logits


@pytest.fixture
def runner(model_dir: Path) -> ModelRunner:
    return build_runner(model_dir)


@pytest.fixture
def driver() -> Driver:
    return Driver(VOCAB_SIZE)


def tokens_of(output: ForwardOutput) -> list[int]:
    return unpack_i32(output.tokens).tolist()


def generate(runner: ModelRunner, driver: Driver, slot: int, known: list[int], count: int) -> list[int]:
    """`count` tokens of the sequence just put into `slot`."""
    drawn = tokens_of(run(runner, driver.plan([(slot, 0, known)])))
    for step in range(count - 1):
        drawn += tokens_of(run(runner, driver.decode({slot: len(known) + step})))
    return drawn


def test_chunks_and_mixed_rows_give_the_reference_tokens(
    runner: ModelRunner, driver: Driver, reference: Reference
) -> None:
    driver.take_slot(3, GREEDY, PROMPT)
    run(runner, driver.plan([(3, 0, PROMPT[:6])], samples=[]))
    driver.take_slot(1, GREEDY, OTHER)
    first = tokens_of(run(runner, driver.plan([(1, 0, OTHER[:3]), (3, 6, PROMPT[6:])], samples=[3])))
    second = tokens_of(run(runner, driver.plan([(1, 3, OTHER[3:]), (3, len(PROMPT), [-1])])))
    answers = {3: first + second[1:], 1: second[:1]}
    for step in range(6):
        starts = {1: len(OTHER) + step, 3: len(PROMPT) + 1 + step}
        for slot, token in zip(starts, tokens_of(run(runner, driver.decode(starts))), strict=True):
            answers[slot].append(token)
    assert answers[3] == reference.generate(None, PROMPT, 8).tokens
    assert answers[1] == reference.generate(None, OTHER, 7).tokens


def test_what_nobody_wants_is_not_computed(
    runner: ModelRunner, driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last layer's KV, steps with prompts go on with what their rows end with, if that is all they are asked."""
    counts: list[int] = []
    model: Any = runner._model
    forward = model.forward

    def counting(*args: Any) -> torch.Tensor:
        hidden = forward(*args)
        counts.append(len(hidden))
        return hidden

    monkeypatch.setattr(model, "forward", counting)
    driver.take_slot(0, GREEDY, PROMPT)
    run(runner, driver.plan([(0, 0, PROMPT[:8])], samples=[]))
    driver.take_slot(1, GREEDY, OTHER)
    run(runner, driver.plan([(0, 8, PROMPT[8:]), (1, 0, OTHER)]))
    run(runner, driver.decode({0: len(PROMPT), 1: len(OTHER)}))
    driver.take_slot(2, GREEDY, PROMPT)
    run(runner, driver.plan([(2, 0, PROMPT), (0, len(PROMPT) + 1, [-1])]))
    driver.take_slot(3, GREEDY, PROMPT)
    run(runner, driver.plan([(3, 0, PROMPT)], prompt_lps=[(4, PROMPT[5], 1)]))
    assert counts == [1, 2, 2, 2, len(PROMPT)]


def test_plans_launched_before_any_result_is_read(
    runner: ModelRunner, driver: Driver, reference: Reference
) -> None:
    driver.take_slot(0, GREEDY, PROMPT)
    plans = [driver.plan([(0, 0, PROMPT)])] + [driver.decode({0: len(PROMPT) + i}) for i in range(2)]
    pending = [runner.execute(plan) for plan in plans]
    outputs = [one.output() for one in pending if one is not None]
    assert [output.step for output in outputs] == [1, 2, 3]
    assert [tokens_of(output)[0] for output in outputs] == reference.generate(None, PROMPT, 3).tokens


@pytest.mark.parametrize("shared", [8, 9, 10])
def test_a_prefix_is_shared_and_its_partial_page_copied(
    runner: ModelRunner, driver: Driver, reference: Reference, shared: int
) -> None:
    driver.take_slot(0, GREEDY, PROMPT)
    run(runner, driver.plan([(0, 0, PROMPT)]))
    fork = [*PROMPT[:shared], 201, 6]
    driver.take_slot(2, GREEDY, fork)
    driver.share_prefix(0, 2, shared)
    drawn = tokens_of(run(runner, driver.plan([(2, shared, fork[shared:]), (0, len(PROMPT), [-1])])))
    follow = tokens_of(run(runner, driver.decode({0: len(PROMPT) + 1, 2: len(fork)})))
    assert [drawn[0], follow[1]] == reference.generate(None, fork, 2).tokens
    assert [drawn[1], follow[0]] == reference.generate(None, PROMPT, 3).tokens[1:]


def penalised_greedy(logits_of: LogitsOf, params: SamplingParams, prompt: list[int], count: int) -> list[int]:
    """Greedy with penalties: repetition by transformers, frequency and presence as OpenAI defines them."""
    repetition: Any = transformers.RepetitionPenaltyLogitsProcessor(params.repetition_penalty)
    drawn: list[int] = []
    for _ in range(count):
        ids = prompt + drawn
        logits = repetition(torch.tensor([ids]), logits_of(ids)[-1:])
        for token in set(drawn):
            logits[0, token] -= params.frequency_penalty * drawn.count(token) + params.presence_penalty
        drawn.append(int(logits.argmax()))
    return drawn


@pytest.mark.parametrize(
    "params",
    [
        # A random model hardly repeats itself, so penalties that ask for repetition are the ones that bite.
        SamplingParams(temperature=0.0, repetition_penalty=0.5),
        SamplingParams(temperature=0.0, frequency_penalty=-2.0),
        SamplingParams(temperature=0.0, presence_penalty=-2.0),
        SamplingParams(temperature=0.0, repetition_penalty=0.6, frequency_penalty=-0.5, presence_penalty=2.0),
    ],
)
def test_penalties_beside_a_row_without(
    runner: ModelRunner,
    driver: Driver,
    reference: Reference,
    logits_of: LogitsOf,
    params: SamplingParams,
) -> None:
    driver.take_slot(4, params, LOOPING)
    driver.take_slot(5, GREEDY, OTHER)
    drawn = [tokens_of(run(runner, driver.plan([(4, 0, LOOPING), (5, 0, OTHER)])))]
    for step in range(11):
        starts = {4: len(LOOPING) + step, 5: len(OTHER) + step}
        drawn.append(tokens_of(run(runner, driver.decode(starts))))
    penalised = [both[0] for both in drawn]
    assert penalised == penalised_greedy(logits_of, params, LOOPING, 12)
    assert penalised != reference.generate(None, LOOPING, 12).tokens
    assert [both[1] for both in drawn] == reference.generate(None, OTHER, 12).tokens


def test_a_preempted_sequence_continues_as_if_nothing_had_happened(
    runner: ModelRunner, driver: Driver
) -> None:
    params = SamplingParams(temperature=0.9, seed=77, repetition_penalty=1.4, frequency_penalty=1.0)
    driver.take_slot(0, params, PROMPT)
    whole = generate(runner, driver, 0, PROMPT, 9)
    known = PROMPT + whole[:5]
    driver.take_slot(2, params, known, prompt_len=len(PROMPT))
    assert generate(runner, driver, 2, known, 4) == whole[5:]


def test_min_new_tokens_holds_stop_ids_back(
    runner: ModelRunner, driver: Driver, reference: Reference, logits_of: LogitsOf
) -> None:
    stop_ids = reference.generate(None, PROMPT, 2).tokens
    expected: list[int] = []
    for _ in range(2):
        logits = logits_of(PROMPT + expected)[-1]
        logits[stop_ids] = -torch.inf
        expected.append(int(logits.argmax()))
    third = int(logits_of(PROMPT + expected)[-1].argmax())
    assert third not in expected  # so that it may be a stop id too: held back so far, allowed from here on
    driver.take_slot(1, GREEDY, OTHER)
    params = SamplingParams(temperature=0.0, min_new_tokens=2)
    driver.take_slot(2, params, PROMPT, stop_ids=[*stop_ids, third])
    drawn = [tokens_of(run(runner, driver.plan([(2, 0, PROMPT), (1, 0, OTHER)])))]
    for step in range(2):
        # Another row that is still held back would keep the mask on for the whole step.
        plan = driver.decode({2: len(PROMPT) + step, 1: len(OTHER) + step})
        drawn.append(tokens_of(run(runner, msgspec.structs.replace(plan, min_new=True))))
    assert [held for held, _ in drawn] == [*expected, third]
    assert [free for _, free in drawn] == reference.generate(None, OTHER, 3).tokens


def test_logprobs_are_the_models_own(runner: ModelRunner, driver: Driver, logits_of: LogitsOf) -> None:
    runner._prompt_chunk = 3  # so that the prompt takes several
    driver.take_slot(0, SamplingParams(temperature=3.0, seed=5, presence_penalty=1.0), PROMPT)
    asked = [(index, PROMPT[index + 1], 2) for index in range(2, len(PROMPT) - 1)]
    output = run(runner, driver.plan([(0, 0, PROMPT)], num_top=4, prompt_lps=asked))
    expected = logits_of(PROMPT).log_softmax(-1)
    token = tokens_of(output)[0]
    _close(output.logprobs, expected[-1, token])
    _close(output.top_logprobs, expected[-1].topk(4).values)
    assert unpack_i32(output.top_ids).tolist() == expected[-1].topk(4).indices.tolist()
    _close(output.prompt_logprobs, expected[2:-1].gather(1, torch.tensor(PROMPT[3:])[:, None]))
    _close(output.prompt_top_logprobs, expected[2:-1].topk(2).values)
    assert unpack_i32(output.prompt_top_ids).tolist() == expected[2:-1].topk(2).indices.flatten().tolist()


def _close(column: bytes, expected: torch.Tensor) -> None:
    torch.testing.assert_close(torch.tensor(unpack_f32(column)), expected.reshape(-1), atol=1e-4, rtol=0)


def test_more_top_logprobs_than_tokens_are_padded() -> None:
    selected = select_logprobs(torch.tensor([[-1.0, -0.5]]), torch.tensor([0]), 3)
    assert selected.top_ids.tolist() == [[1, 0, -1]]
    assert selected.top.tolist() == [[-0.5, -1.0, -torch.inf]]


def test_seeded_draws_depend_on_nothing_but_the_request(
    runner: ModelRunner, driver: Driver, logits_of: LogitsOf
) -> None:
    params = SamplingParams(temperature=1.3, top_k=50, top_p=0.9, min_p=0.01, seed=2**40 + 3)
    driver.take_slot(0, params, PROMPT)
    alone = generate(runner, driver, 0, PROMPT, 6)
    ids = list(PROMPT)
    for token in alone:
        position = torch.tensor([len(ids)])
        seed = (torch.tensor([3]), torch.tensor([2**8]))
        drawn = sample(
            logits_of(ids)[-1:],
            torch.tensor([1.3]),
            torch.tensor([50]),
            torch.tensor([0.9]),
            torch.tensor([0.01]),
            uniform(*seed, torch.tensor([0]), position),
        )
        assert token == int(drawn)
        ids.append(token)

    driver.take_slot(1, SamplingParams(temperature=0.7, seed=1), OTHER)
    driver.take_slot(5, params, PROMPT)
    driver.take_slot(2, params, PROMPT, sample_index=1)
    drawn = [tokens_of(run(runner, driver.plan([(1, 0, OTHER), (5, 0, PROMPT), (2, 0, PROMPT)])))]
    for step in range(5):
        starts = {1: len(OTHER) + step, 5: len(PROMPT) + step, 2: len(PROMPT) + step}
        drawn.append(tokens_of(run(runner, driver.decode(starts))))
    assert [row[1] for row in drawn] == alone
    assert [row[2] for row in drawn] != alone


class Poisoned:
    """A model whose first `num_rows` rows of logits come out broken."""

    def __init__(self, model: Model, num_rows: int) -> None:
        self.forward = model.forward
        self._whole = model.logits
        self.num_rows = num_rows

    def logits(self, hidden_rows: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        logits = self._whole(hidden_rows, out)
        logits[: self.num_rows, 9] = torch.nan
        return logits


def test_logits_that_are_not_finite_are_reported_and_do_no_harm(
    runner: ModelRunner, driver: Driver, reference: Reference
) -> None:
    poisoned = Poisoned(runner._model, 2)
    runner._model = poisoned
    driver.take_slot(0, GREEDY, PROMPT)
    driver.take_slot(1, SamplingParams(seed=1, top_p=0.9), PROMPT)
    driver.take_slot(2, GREEDY, OTHER)
    first = tokens_of(run(runner, driver.plan([(0, 0, PROMPT), (1, 0, PROMPT), (2, 0, OTHER)])))
    assert first[:2] == [-1, -1]
    poisoned.num_rows = 0
    starts = {0: len(PROMPT), 1: len(PROMPT), 2: len(OTHER)}
    follow = tokens_of(run(runner, driver.decode(starts)))
    assert min(follow) >= 0
    assert [first[2], follow[2]] == reference.generate(None, OTHER, 2).tokens


def test_a_plan_without_samples_still_answers(runner: ModelRunner, driver: Driver) -> None:
    driver.take_slot(0, GREEDY, PROMPT)
    output = run(runner, driver.plan([(0, 0, PROMPT)], samples=[]))
    assert output == ForwardOutput(1, b"")


def test_prompt_logits_never_exceed_their_bound(runner: ModelRunner) -> None:
    assert runner._prompt_chunk * VOCAB_SIZE * 4 <= model_runner.PROMPT_LOGITS_BYTES
