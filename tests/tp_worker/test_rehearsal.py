"""The rehearsal: steps of many kinds that leave what is being served as it was."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels import linear_triton, lora_expand_decode_triton
from manylora.kernels.lora_work import LoRAWork
from manylora.runtime.messages import unpack_i32
from manylora.runtime.plan import read_section
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.rehearsal import Rehearsal, rehearse
from tests.reference import Reference
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.plan_driver import MAX_PAGES, NUM_SLOTS, PAGE_SIZE, Driver, build_runner, run

PROMPT = [0, 17, 43, 99, 250, 17, 8, 301, 64, 17, 120]


def test_a_sequence_goes_on_as_if_nothing_had_been(tiny_models: TinyModels) -> None:
    model_dir = tiny_models.model("llama")
    runner, driver = build_runner(model_dir), Driver(VOCAB_SIZE)
    driver.take_slot(2, SamplingParams(temperature=0.0), PROMPT)
    drawn = [run(runner, driver.plan([(2, 0, PROMPT)]))]
    rehearsal = Rehearsal(NUM_SLOTS, NUM_SLOTS, MAX_PAGES * PAGE_SIZE, VOCAB_SIZE, lora=False)
    rehearse(runner, rehearsal.plans())
    drawn += [run(runner, driver.decode({2: len(PROMPT) + step})) for step in range(4)]
    expected = Reference(model_dir).generate(None, PROMPT, 5).tokens
    assert [unpack_i32(output.tokens)[0] for output in drawn] == expected


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("max_rows", "max_tokens"), [(1, 5), (256, 8192), (512, 2048)])
def test_every_plan_is_well_formed(max_rows: int, max_tokens: int, lora: bool) -> None:
    plans = list(Rehearsal(9, max_rows, max_tokens, 100, lora).plans())
    for plan in plans:
        rows = read_section(plan, "rows")
        assert plan.num_rows <= max_rows
        assert all(slot == 9 and start == 0 and num_new <= max_tokens for slot, start, num_new, _ in rows)
        assert [offset for *_, offset in rows] == [sum(row[2] for row in rows[:i]) for i in range(len(rows))]
        assert all(num_new == 1 for _, _, num_new, _ in rows[plan.num_prefill_rows :])
        assert plan.num_prefill_tokens == sum(row[2] for row in rows[: plan.num_prefill_rows])
        assert plan.num_prefill_tokens <= max_tokens
    assert any(plan.max_slices for plan in plans) == lora
    assert not plans[-1].greedy


def test_there_are_steps_of_every_size() -> None:
    sizes = {
        (plan.num_prefill_rows, plan.num_prefill_tokens)
        for plan in Rehearsal(0, 512, 8192, 100, True).plans()
    }
    assert {(1, 8), (1, 64), (40, 40), (1, 512), (40, 480), (300, 300), (1, 4096), (40, 4080)} < sizes


@pytest.mark.parametrize("max_tokens", [5, 16, 24, 48, 100, 8192])
@pytest.mark.parametrize("max_rows", [1, 8, 40, 64, 256])
def test_the_lora_kernels_of_every_step_are_rehearsed(max_rows: int, max_tokens: int) -> None:
    def kernels(num_tokens: int, num_segments: int) -> tuple[object, ...]:
        lists = torch.zeros(num_segments, 4, dtype=torch.int64)
        work = LoRAWork(lists, lists[:, 0], 1, num_tokens, 48)
        launch = lora_expand_decode_triton.default_launch(work) if work.decode else None
        behind = num_tokens <= linear_triton.MAX_ROWS  # our own product, as dependent launches
        chunks = [work.planes(features, 48).shape[0] for features in (1024, 4096)]
        return launch, behind, work.tile_tokens, *chunks

    plans = [plan for plan in Rehearsal(9, max_rows, max_tokens, 100, True).plans() if plan.max_slices]
    rehearsed = {kernels(plan.num_tokens, plan.count("segments")) for plan in plans}
    for num_tokens in [*range(1, min(max_tokens, 260) + 1), max_tokens]:
        for num_segments in range(1, min(num_tokens, max_rows) + 1):
            assert kernels(num_tokens, num_segments) in rehearsed, (num_tokens, num_segments)
