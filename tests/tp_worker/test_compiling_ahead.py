"""The steps whose kernels are compiled ahead, with every kernel's result undefined: the CPU refuses an index out of bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from manylora.runtime.plan import read_section
from manylora.tp_worker import decode_graph as decode_graphs
from manylora.tp_worker import sampler, slot_state
from manylora.tp_worker.layers import attention, embedding, linear, norm
from manylora.tp_worker.model_runner import ModelRunner
from manylora.tp_worker.models import decoder
from manylora.tp_worker.rehearsal import Rehearsal, rehearse
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.plan_driver import MAX_PAGES, NUM_SLOTS, PAGE_SIZE, build_runner, make_graphs

REHEARSAL = Rehearsal(NUM_SLOTS, NUM_SLOTS, MAX_PAGES * PAGE_SIZE, VOCAB_SIZE, lora=False)
NOWHERE = 1 << 30  # as a token or an index


def undefined(like: torch.Tensor, *shape: int, dtype: torch.dtype | None = None) -> torch.Tensor:
    dtype = dtype or like.dtype
    return torch.full(shape or like.shape, torch.nan if dtype.is_floating_point else NOWHERE, dtype=dtype)


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that is a kernel on a GPU writes anything."""

    def product(x: torch.Tensor, weight: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        return undefined(x, len(x), len(weight))

    def half(x: torch.Tensor, *_: Any) -> torch.Tensor:
        return undefined(x, len(x), x.shape[1] // 2)

    def write_nothing(*_: Any) -> None: ...

    def draw_greedy(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return undefined(logits, len(logits), dtype=torch.int32)

    def sample(logits: torch.Tensor, *_: Any) -> torch.Tensor:
        return undefined(logits, len(logits), dtype=torch.int64)

    def uniform(*columns: torch.Tensor) -> torch.Tensor:
        return undefined(columns[0], dtype=torch.float32)

    for module, replacements in {
        norm: {"rms_norm": lambda x, *_: undefined(x), "fused_add_rms_norm": lambda x, *_: undefined(x)},
        decoder: {"silu_and_mul": half},
        linear: {"linear": product},
        embedding: {"linear": product},
        attention: dict.fromkeys(
            ("rope_and_store", "paged_prefill_attention", "paged_decode_attention"), write_nothing
        ),
        slot_state: {"draw_greedy": draw_greedy},
        sampler: {"sample": sample, "uniform": uniform},
        decode_graphs: {"fill_decode_inputs": write_nothing},
    }.items():
        for name, replacement in replacements.items():
            monkeypatch.setattr(module, name, replacement)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)


@pytest.fixture
def runner(tiny_models: TinyModels) -> ModelRunner:
    return build_runner(tiny_models.model("llama"))


@pytest.mark.usefixtures("without_kernels")
def test_steps_take_no_index_from_a_kernel(runner: ModelRunner) -> None:
    rehearse(runner, REHEARSAL.plans_to_compile())
    with pytest.raises(IndexError):  # as other steps do
        rehearse(runner, REHEARSAL.plans())


@pytest.mark.usefixtures("without_kernels")
def test_the_steps_of_graphs_take_none_either(runner: ModelRunner) -> None:
    for graphs in make_graphs(runner):
        graphs.rehearse()


def test_they_have_every_size_and_both_ways_of_drawing() -> None:
    rehearsal = Rehearsal(9, 512, 8192, 100, lora=True)
    drawing, *sizes = reversed(list(rehearsal.plans_to_compile()))
    assert sizes[::-1] == list(rehearsal.plans())[:-2]
    assert not drawing.greedy
    last = list(rehearsal.plans())[-1]
    assert read_section(drawing, "samples") == read_section(last, "samples")
