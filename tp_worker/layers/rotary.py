"""The cosine and sine table of rotary embedding, with the frequency scalings we implement."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from manylora.runtime.model_config import RopeConfig


def rotary_table(rope: RopeConfig, head_dim: int, num_positions: int, device: torch.device) -> Tensor:
    """(num_positions, head_dim) float32: cosines, then sines, of position · frequency; see `kernels/rotary.py`."""
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = torch.outer(positions, _frequencies(rope, head_dim))
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(device)


def _frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """(head_dim / 2,) radians per token."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / rope.theta**exponents
    if rope.rope_type == "linear":
        return frequencies / rope.factor
    if rope.rope_type == "llama3":
        return _llama3(frequencies, rope)
    return frequencies


def _llama3(frequencies: Tensor, rope: RopeConfig) -> Tensor:
    """Llama 3.1's context extension: long waves are slowed by `factor`, short ones kept, a ramp between the two."""
    turns = rope.original_max_position_embeddings * frequencies / (2 * math.pi)  # in the original context
    keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    keep = keep.clamp(0.0, 1.0)
    return keep * frequencies + (1.0 - keep) * frequencies / rope.factor
