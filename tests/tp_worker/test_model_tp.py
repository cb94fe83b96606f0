"""The decoder and the collectives on several ranks, over gloo and NCCL: the logits of transformers, on every rank.

Between them the families have KV heads above, at and below the number of ranks, and a vocabulary no tp divides.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_models import FAMILIES, TinyModels
from tests.tp_worker.reference_logits import reference_logits
from tests.tp_worker.steps import SCHEDULES, row_ends
from tests.tp_worker.tp_main import rank_values

torch.set_num_threads(1)
ROOT = Path(__file__).parents[2]
Results = list[dict[str, torch.Tensor]]  # by rank


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(("cpu", 2), id="tp2"),
        pytest.param(("cpu", 4), id="tp4"),
        pytest.param(("cuda", 2), id="nccl2", marks=pytest.mark.multigpu),
    ],
)
def results(
    request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Results:
    device, size = request.param
    run_dir = tmp_path_factory.mktemp("tp")
    run_ranks(device, size, run_dir, [tiny_models.model(family) for family in FAMILIES])
    return [load_file(run_dir / f"rank-{rank}.safetensors") for rank in range(size)]


def run_ranks(device: str, size: int, run_dir: Path, model_dirs: list[Path]) -> None:
    """Run `tp_main` once per rank; fails if one fails, and leaves none behind."""
    paths = [str(ROOT / ".pkg"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.tp_worker.tp_main"]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), device, str(run_dir), *map(str, model_dirs)],
            cwd=ROOT,
            env=environment,
        )
        for rank in range(size)
    ]
    try:
        codes = [process.wait(timeout=100) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert codes == [0] * size


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(family: str, results: Results, tiny_models: TinyModels) -> None:
    model_dir = tiny_models.model(family)
    expected = reference_logits(model_dir)
    for schedule in SCHEDULES:
        torch.testing.assert_close(results[0][f"{model_dir.name}/{schedule}"], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama_bias_tied", "qwen3"])
def test_deltas_join_the_partial_sums(family: str, results: Results, tiny_models: TinyModels) -> None:
    model_dir = tiny_models.model(family)
    doubled = reference_logits(model_dir, scale=2.0)
    torch.testing.assert_close(results[0][f"{model_dir.name}/doubled"], doubled, rtol=0, atol=1e-4)
    narrowed = results[0][f"{model_dir.name}/doubled/narrowed"]
    torch.testing.assert_close(narrowed, doubled[row_ends(SCHEDULES["mixed"])], rtol=0, atol=1e-4)


def test_every_rank_has_the_same_bits(results: Results) -> None:
    for other in results[1:]:
        assert other.keys() == results[0].keys()
        for name, value in results[0].items():
            assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_collectives(dtype: torch.dtype, results: Results) -> None:
    values = torch.stack([rank_values(rank, dtype) for rank in range(len(results))])
    assert torch.equal(results[0][f"gathered/{dtype}"], values)
    total = values.double().sum(0)
    torch.testing.assert_close(results[0][f"reduced/{dtype}"], total.to(dtype))
