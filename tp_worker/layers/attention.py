"""Self-attention of one layer on one rank: its share of the heads, over the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from manylora.kernels.paged_attention import paged_decode_attention, paged_prefill_attention
from manylora.kernels.rope_and_store import rope_and_store
from manylora.runtime.model_config import ModelConfig
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.linear import (
    ColumnParallelLinear,
    Part,
    Product,
    RowParallelLinear,
    even_part,
)
from manylora.tp_worker.layers.norm import RMSNorm
from manylora.tp_worker.layers.shard import Shards
from manylora.tp_worker.step_inputs import StepInputs


class Attention:
    """Rank i of N has query heads [i·heads/N, (i+1)·heads/N) and the KV heads they read."""

    def __init__(self, config: ModelConfig, cos_sin: Tensor, *, group: TPGroup, dtype: torch.dtype) -> None:
        self.cos_sin = cos_sin
        self.head_dim = config.head_dim
        self.num_heads = config.num_heads // group.size
        self.num_kv_heads = config.kv_heads_per_rank(group.size)
        self.scale = config.head_dim**-0.5
        q_size = config.num_heads * config.head_dim
        parts = (
            even_part("q_proj", q_size, group),
            _kv_part("k_proj", config, group),
            _kv_part("v_proj", config, group),
        )
        self.qkv_proj = ColumnParallelLinear(
            config.hidden_size,
            parts,
            bias=config.qkv_bias,
            group=group,
            dtype=dtype,
            defers=not config.qk_norm,
        )
        self.o_proj = RowParallelLinear(
            "o_proj", q_size, config.hidden_size, bias=config.o_bias, group=group, dtype=dtype
        )
        self.q_norm = self.k_norm = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=group.device)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps, dtype=dtype, device=group.device)

    def project(self, x: Tensor, inputs: StepInputs, kv_cache: Tensor) -> Tensor:
        """x (T, hidden) -> queries (T, heads, head_dim); the step's K and V go into the layer's cache.

        kv_cache (pages, 2, kv_heads, page_size, head_dim).
        """
        qkv, addend = self.qkv_proj(x, inputs.lora)
        heads = qkv.view(len(x), -1, self.head_dim)
        q, k, v = heads.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        rope_and_store(q, k, v, self.cos_sin, inputs.positions, kv_cache, inputs.kv_slots, addend)
        return q

    def attend(self, q: Tensor, inputs: StepInputs, kv_cache: Tensor) -> Product:
        """Queries (T, heads, head_dim) of tokens whose K and V lie in the cache -> (T, hidden)."""
        attended = self._attend(q, inputs, kv_cache)
        return self.o_proj(attended.view(len(q), -1), inputs.lora)

    def _attend(self, q: Tensor, inputs: StepInputs, kv_cache: Tensor) -> Tensor:
        if inputs.attend is not None:
            return inputs.attend(q, kv_cache, self.scale)
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        attend(q, inputs, kv_cache, self.scale, out)
        return out

    def shards(self, prefix: str) -> Shards:
        yield from self.qkv_proj.shards(prefix)
        yield from self.o_proj.shards(prefix)
        if self.q_norm is not None and self.k_norm is not None:
            yield from self.q_norm.shards(f"{prefix}q_norm")
            yield from self.k_norm.shards(f"{prefix}k_norm")


def _kv_part(name: str, config: ModelConfig, group: TPGroup) -> Part:
    """K or V: whole heads; with fewer heads than ranks, neighbouring ranks have the same one."""
    first_head = group.rank * config.num_kv_heads // group.size
    size = config.kv_heads_per_rank(group.size) * config.head_dim
    return Part(name, config.num_kv_heads * config.head_dim, first_head * config.head_dim, size)


def attend(q: Tensor, inputs: StepInputs, kv_cache: Tensor, scale: float, out: Tensor) -> None:
    """Attend with every row's queries to what the cache holds of it, its own tokens included.

    q, out (T, heads, head_dim); kv_cache (pages, 2, kv_heads, page_size, head_dim); scale multiplies q·k.
    """
    rows, tokens = inputs.num_prefill_rows, inputs.num_prefill_tokens
    table = inputs.page_table
    if tokens:
        paged_prefill_attention(q[:tokens], kv_cache, table, inputs.rows[:rows], scale, out[:tokens])
    if len(q) > tokens:
        slots, kv_lens = inputs.slots[rows:], inputs.kv_lens[rows:]
        paged_decode_attention(
            q[tokens:], kv_cache, table, slots, kv_lens, inputs.max_kv_len, scale, out[tokens:]
        )
