"""The decoder against transformers: every family, whole and chunked prompts, decode, mixed rows, one rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manylora.lora.page_layout import SITES
from manylora.runtime.model_config import load_model_config
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.embedding import LMHead, VocabParallelWeight
from manylora.tp_worker.models.decoder import Decoder
from manylora.tp_worker.weight_loader import load_model
from tests.tiny_models import FAMILIES, TinyModels
from tests.tp_worker.reference_logits import reference_logits
from tests.tp_worker.steps import SCHEDULES, double_every_projection, row_ends, run_schedule

torch.set_num_threads(1)
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


def load(model_dir: Path, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Decoder:
    config, target = load_model_config(model_dir), torch.device(device)
    group = TPGroup(0, 1, target)
    return load_model(config, model_dir, "auto", dtype, target, group, seed=0, progress=False)


@on_every_device
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, device: str, tiny_models: TinyModels) -> None:
    model_dir = tiny_models.model(family)
    decoder, expected = load(model_dir, device), reference_logits(model_dir)
    for schedule in SCHEDULES.values():
        torch.testing.assert_close(run_schedule(decoder, schedule), expected, rtol=0, atol=1e-4)


@on_every_device
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("family", ["llama_bias_tied", "qwen3"])
def test_a_narrowed_step_computes_what_rows_end_with(
    family: str, schedule: str, device: str, tiny_models: TinyModels
) -> None:
    model_dir = tiny_models.model(family)
    decoder, steps = load(model_dir, device), SCHEDULES[schedule]
    logits = run_schedule(decoder, steps, narrowed=True)
    torch.testing.assert_close(logits, reference_logits(model_dir)[row_ends(steps)], rtol=0, atol=1e-4)
    batch = double_every_projection(decoder)
    doubled = run_schedule(decoder, steps, batch, narrowed=True)
    expected = reference_logits(model_dir, scale=2.0)[row_ends(steps)]
    torch.testing.assert_close(doubled, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_bias_tied", "qwen3"])
def test_deltas_are_added_at_every_site(family: str, tiny_models: TinyModels) -> None:
    model_dir = tiny_models.model(family)
    decoder = load(model_dir)
    batch = double_every_projection(decoder)
    doubled = run_schedule(decoder, SCHEDULES["mixed"], batch)
    torch.testing.assert_close(doubled, reference_logits(model_dir, scale=2.0), rtol=0, atol=1e-4)
    without_batch = run_schedule(decoder, SCHEDULES["mixed"])
    torch.testing.assert_close(without_batch, reference_logits(model_dir), rtol=0, atol=1e-4)


def test_lora_sites_are_those_of_the_page_layout(tiny_models: TinyModels) -> None:
    decoder = load(tiny_models.model("llama"))
    sites = [(layer, site) for layer, site, _ in decoder.lora_sites()]
    assert sites == [(layer, site) for layer in range(2) for site in range(len(SITES))]
    widths = [module.weight.shape[0] for _, _, module in decoder.lora_sites()][:4]
    assert widths == [64 + 2 * 32, 64, 2 * 96, 64]


@on_every_device
def test_bfloat16_stays_close_and_gives_logits_of_its_own(device: str, tiny_models: TinyModels) -> None:
    model_dir = tiny_models.model("llama")
    decoder = load(model_dir, device, torch.bfloat16)
    logits = run_schedule(decoder, SCHEDULES["mixed"])
    assert logits.dtype == torch.bfloat16
    expected = reference_logits(model_dir)
    error = (logits.float() - expected).norm() / expected.norm()
    assert error < 0.05


class Gathering(TPGroup):
    """The first of several ranks, which all hold what it holds."""

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        return torch.stack([x + rank for rank in range(self.size)])


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_logits_are_whole_and_go_where_they_are_wanted(size: int) -> None:
    """A vocabulary of 10: with 3 ranks the last has padding, with 7 two have nothing else."""
    weight = VocabParallelWeight(10, 4, group=Gathering(0, size, torch.device("cpu")), dtype=torch.bfloat16)
    weight.rows.copy_(torch.arange(weight.rows.numel()).view_as(weight.rows))
    hidden = torch.eye(4, dtype=torch.bfloat16)[:3]
    each = len(weight.rows)
    expected = [[4 * (token % each) + row + token // each for token in range(10)] for row in range(3)]
    logits = LMHead(weight)(hidden)
    assert logits.tolist() == expected
    assert logits.is_contiguous()
    out = torch.zeros(5, 10, dtype=torch.bfloat16)
    given = LMHead(weight)(hidden, out[:3])
    assert given.data_ptr() == out.data_ptr()
    assert out.tolist() == [*expected, [0.0] * 10, [0.0] * 10]
