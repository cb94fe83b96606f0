"""The runner on a CUDA device: same tokens, pinned rings that come round, and not one wait inside a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.runtime.messages import unpack_i32
from manylora.runtime.plan import ForwardOutput
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.model_runner import ModelRunner
from manylora.tp_worker.transfers import RING, Download, Upload
from tests.reference import Reference
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.plan_driver import Driver, build_runner, run, with_graphs

pytestmark = pytest.mark.gpu

PROMPT = [0, 17, 43, 99, 250, 17, 8, 301, 64, 17, 120]
GREEDY = SamplingParams(temperature=0.0)
SAMPLED = SamplingParams(
    temperature=1.1,
    top_k=40,
    top_p=0.95,
    min_p=0.01,
    seed=12,
    repetition_penalty=1.2,
    frequency_penalty=0.5,
    min_new_tokens=3,
    logit_bias={9: 1.5, 40: -3.0},
)


@pytest.fixture(scope="module")
def model_dir(tiny_models: TinyModels) -> Path:
    return tiny_models.model("llama")


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """Any operation that waits for the device raises."""
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def build_on_device(model_dir: Path) -> ModelRunner:
    return build_runner(model_dir, "cuda")


def runner_with_graphs(model_dir: Path) -> ModelRunner:
    return with_graphs(build_on_device(model_dir))


def decode_twice(runner: ModelRunner, count: int) -> list[list[int]]:
    """Tokens of a greedy and of a sampled sequence, side by side."""
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(1, GREEDY, PROMPT)
    driver.take_slot(3, SAMPLED, PROMPT, stop_ids=[1, 2])
    outputs = [run(runner, driver.plan([(1, 0, PROMPT), (3, 0, PROMPT)], num_top=3))]
    for step in range(count - 1):
        starts = {1: len(PROMPT) + step, 3: len(PROMPT) + step}
        outputs.append(run(runner, driver.decode(starts)))
    return [unpack_i32(output.tokens).tolist() for output in outputs]


def test_the_device_draws_what_the_cpu_draws(model_dir: Path) -> None:
    on_device = decode_twice(build_on_device(model_dir), 8)
    assert on_device == decode_twice(build_runner(model_dir), 8)
    assert on_device == decode_twice(runner_with_graphs(model_dir), 8)
    reference = Reference(model_dir).generate(None, PROMPT, 8).tokens
    assert [greedy for greedy, _ in on_device] == reference


def decode_greedily(runner: ModelRunner) -> list[list[int]]:
    """Three sequences over several pages, two steps in flight; a fourth gets its slot in a step of decode rows alone."""
    driver, lengths = Driver(VOCAB_SIZE), {1: 11, 4: 7, 5: 4}
    for slot, length in lengths.items():
        driver.take_slot(slot, GREEDY, PROMPT[:length])
    plans = [driver.plan([(slot, 0, PROMPT[:length]) for slot, length in lengths.items()])]
    for step in range(12):
        starts = {slot: length + step for slot, length in lengths.items()}
        if step == 6:
            driver.take_slot(0, GREEDY, PROMPT)
        if step == 7:
            rows = [(slot, start, [-1]) for slot, start in starts.items()]
            plans.append(driver.plan([(0, 0, PROMPT), *rows]))
            lengths[0] = len(PROMPT) - 8
        else:
            plans.append(driver.decode(starts))
    drawn: list[list[int]] = []
    for first in range(0, len(plans), 2):
        pending = [runner.execute(plan) for plan in plans[first : first + 2]]
        torch.cuda.synchronize()
        drawn += [unpack_i32(one.output().tokens).tolist() for one in pending if one is not None]
    return drawn


def test_graphs_draw_what_steps_without_them_draw(model_dir: Path) -> None:
    drawn = decode_greedily(runner_with_graphs(model_dir))
    assert drawn == decode_greedily(build_on_device(model_dir))
    assert [len(tokens) for tokens in drawn] == [3] * 8 + [4] * 5
    reference = Reference(model_dir).generate(None, PROMPT, 8).tokens
    assert [tokens[0] for tokens in drawn[:8]] == reference
    assert [drawn[8][0], *(tokens[3] for tokens in drawn[9:])] == reference[:5]


def test_a_graph_tells_of_logits_that_are_not_finite(model_dir: Path) -> None:
    runner, driver = runner_with_graphs(model_dir), Driver(VOCAB_SIZE)
    model: Any = runner._model
    driver.take_slot(2, GREEDY, PROMPT)
    expected = unpack_i32(run(runner, driver.plan([(2, 0, PROMPT)])).tokens).tolist()
    weight: torch.Tensor = model.lm_head.weight.rows
    row = weight[9].clone()
    with torch.inference_mode():  # as the loader filled it
        weight[9] = torch.nan
    assert unpack_i32(run(runner, driver.decode({2: len(PROMPT)})).tokens).tolist() == [-1]
    assert 0 <= int(runner._state.last_token[2]) < VOCAB_SIZE
    with torch.inference_mode():
        weight[9] = row
    driver.take_slot(2, GREEDY, PROMPT)
    assert unpack_i32(run(runner, driver.plan([(2, 0, PROMPT)])).tokens).tolist() == expected


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("make_runner", [build_on_device, runner_with_graphs])
def test_a_step_never_waits_for_the_device(
    make_runner: Callable[[Path], ModelRunner], model_dir: Path
) -> None:
    torch.cuda.set_sync_debug_mode("default")
    runner, driver = make_runner(model_dir), Driver(VOCAB_SIZE)
    driver.take_slot(1, GREEDY, PROMPT)
    run(runner, driver.plan([(1, 0, PROMPT)]))  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    driver.take_slot(3, SAMPLED, PROMPT, stop_ids=[1, 2])
    driver.share_prefix(1, 3, 9)
    driver.take_slot(4, GREEDY, PROMPT)
    asked, some = [(1, PROMPT[10], 2)], {3: range(100)}
    plans = [
        driver.plan([(3, 9, PROMPT[9:]), (1, len(PROMPT), [-1])], num_top=3, prompt_lps=asked, allowed=some),
        driver.decode({1: len(PROMPT) + 1, 3: len(PROMPT)}, allowed=some),
        driver.decode({1: len(PROMPT) + 2}),
        driver.plan([(4, 0, PROMPT), (1, len(PROMPT) + 3, [-1])]),
    ]
    pending = [runner.execute(plan) for plan in plans]
    torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    outputs: list[ForwardOutput] = [one.output() for one in pending if one is not None]
    assert [len(unpack_i32(output.tokens)) for output in outputs] == [2, 2, 1, 2]


def test_the_rings_come_round_and_grow() -> None:
    device = torch.device("cuda")
    upload, download = Upload(device), Download(device)
    for size in (3, 70_000, 5, 200_000, 1, 8)[: RING + 2]:
        values = torch.arange(size, dtype=torch.int32)
        uploaded = upload(values.numpy().tobytes())
        columns = download({"a": uploaded, "b": uploaded.float()[:1]})
        while not columns.ready():
            pass
        assert columns.to_bytes() == {"a": values.numpy().tobytes(), "b": b"\0\0\0\0"}
