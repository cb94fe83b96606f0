"""The tensor-parallel group: who the ranks are and how they add up and collect their parts."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

_TIMEOUT = timedelta(minutes=10)
# torch 2.13 renamed it and warns of the old name; 2.11 knows only that.
_all_gather: Callable[[torch.Tensor, torch.Tensor], object] = getattr(
    dist, "all_gather_single", dist.all_gather_into_tensor
)


class TPGroup:
    """One rank's end of the group. With one rank every operation is the identity.

    Collectives must be called in the same order with the same shapes on every rank. Their results are the same bits
    on every rank: each sampler may draw from its own copy.
    """

    def __init__(self, rank: int, size: int, device: torch.device) -> None:
        self.rank = rank
        self.size = size
        self.device = device

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum a contiguous x over the ranks, in place; returns x."""
        if self.size == 1:
            return x
        if self.device.type == "cuda":
            dist.all_reduce(x)
            return x
        # gloo's own reduction adds in an order that depends on where an element lies in x, so a row's result would
        # change with its neighbours; in float32 and rank order it does not, and costs fewer round trips.
        return x.copy_(self.all_gather(x).sum(0, dtype=torch.float32))

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """(…) -> (size, …): every rank's x, in rank order, in a new tensor (a view of x with one rank)."""
        if self.size == 1:
            return x.unsqueeze(0)
        gathered = torch.empty((self.size, *x.shape), dtype=x.dtype, device=x.device)
        _all_gather(gathered.view(-1), x.contiguous().view(-1))
        return gathered

    def close(self) -> None:
        """Leave the group; no operation may follow."""
        if self.size > 1:
            dist.destroy_process_group()


def init_tp_group(rank: int, size: int, device: torch.device, run_dir: str | Path, epoch: int = 0) -> TPGroup:
    """Join the group; returns when every rank has. NCCL on CUDA, gloo over the loopback interface on CPU.

    The ranks meet at a file in `run_dir`; `epoch` names it, so that a restarted group never meets a dead one's file.
    """
    if size == 1:
        return TPGroup(rank, size, device)
    # Both default to NVLink multicast, which needs rights on the GPUs' fabric that a container may not have.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    on_gpu = device.type == "cuda"
    dist.init_process_group(
        "nccl" if on_gpu else "gloo",
        init_method=f"file://{Path(run_dir).resolve()}/tp-{epoch}",
        rank=rank,
        world_size=size,
        timeout=_TIMEOUT,
        device_id=device if on_gpu else None,
    )
    return TPGroup(rank, size, device)
