"""Rotary position embedding: the reference half of `rope_and_store`."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_embedding(q: Tensor, k: Tensor, cos_sin: Tensor, positions: Tensor) -> None:
    """Rotate q and k in place by their tokens' positions.

    q (T, heads, d) and k (T, kv_heads, d), any strides; cos_sin (max_positions, d) float32, cosines in the first d/2
    columns and sines in the rest; positions (T,) int64.

    Semantics, for each head with halves a = x[:d/2], b = x[d/2:]:
        a, b = a·cos - b·sin, b·cos + a·sin        in float32, rounded once
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        a, b = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))
