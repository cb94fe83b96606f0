"""The rehearsal: steps of many kinds that leave what is being served as it was."""

from __future__ import annotations

import pytest

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
    assert any(plan.max_slices for plan in plans) == (lora and max_tokens >= 8)
    assert not plans[-1].greedy


def test_there_are_steps_of_every_size() -> None:
    sizes = {
        (plan.num_prefill_rows, plan.num_prefill_tokens)
        for plan in Rehearsal(0, 512, 8192, 100, True).plans()
    }
    assert {(1, 8), (1, 64), (40, 40), (1, 512), (40, 480), (300, 300), (1, 4096), (40, 4080)} < sizes
