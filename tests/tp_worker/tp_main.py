"""One rank of a tensor-parallel run of the decoder: `python -m tests.tp_worker.tp_main RANK SIZE DEVICE RUN_DIR MODEL_DIR…`.

Writes RUN_DIR/rank-RANK.safetensors: the logits of every model and schedule, and what the collectives gave.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from manylora.runtime.model_config import load_model_config
from manylora.tp_worker.distributed import TPGroup, init_tp_group
from manylora.tp_worker.weight_loader import load_model
from tests.tp_worker.steps import SCHEDULES, double_every_projection, run_schedule


def main(rank: int, size: int, device: torch.device, run_dir: Path, model_dirs: list[Path]) -> None:
    torch.set_num_threads(1)
    group = init_tp_group(rank, size, device, run_dir)
    results = collective_results(group)
    for model_dir in model_dirs:
        config = load_model_config(model_dir)
        decoder = load_model(config, model_dir, "auto", torch.float32, device, group, seed=0, progress=False)
        for name, schedule in SCHEDULES.items():
            results[f"{model_dir.name}/{name}"] = run_schedule(decoder, schedule)
        batch = double_every_projection(decoder)
        results[f"{model_dir.name}/doubled"] = run_schedule(decoder, SCHEDULES["mixed"], batch)
        narrowed = run_schedule(decoder, SCHEDULES["mixed"], batch, narrowed=True)
        results[f"{model_dir.name}/doubled/narrowed"] = narrowed
    save_file(results, run_dir / f"rank-{rank}.safetensors")
    group.all_reduce(torch.zeros(1, device=device)).cpu()  # nobody leaves while another still computes
    group.close()


def collective_results(group: TPGroup) -> dict[str, torch.Tensor]:
    """Sums and collections of `rank_values`."""
    results: dict[str, torch.Tensor] = {}
    for dtype in (torch.float32, torch.bfloat16):
        x = rank_values(group.rank, dtype).to(group.device)
        results[f"gathered/{dtype}"] = group.all_gather(x).cpu()
        results[f"reduced/{dtype}"] = group.all_reduce(x).cpu()
    return results


def rank_values(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """Values whose sum depends on the order of addition."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(37, 11, generator=generator).exp().to(dtype)


if __name__ == "__main__":
    _, rank, size, device_type, run_dir, *model_dirs = sys.argv
    device = torch.device(device_type, int(rank)) if device_type == "cuda" else torch.device(device_type)
    main(int(rank), int(size), device, Path(run_dir), [Path(model_dir) for model_dir in model_dirs])
