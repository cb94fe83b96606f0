"""What a kernel's launch asks of its GPU. Where there is none, kernels are interpreted, or compiled as for an H200."""

from __future__ import annotations

from functools import cache

import torch

HOPPER = (9, 0)
_H200_MULTIPROCESSORS = 132


@cache
def capability(device: torch.device) -> tuple[int, int]:
    """(major, minor) of the GPU; (0, 0) of a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return _H200_MULTIPROCESSORS
    return torch.cuda.get_device_properties(device).multi_processor_count
