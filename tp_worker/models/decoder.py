"""The dense decoder behind Llama, Mistral, Qwen2 and Qwen3: one class, the families' differences are data."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from manylora.kernels.activation import silu_and_mul
from manylora.lora.lora_batch import LoRABatch
from manylora.runtime.model_config import ModelConfig
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.attention import Attention
from manylora.tp_worker.layers.embedding import LMHead, VocabParallelEmbedding, VocabParallelWeight
from manylora.tp_worker.layers.linear import ColumnParallelLinear, Product, RowParallelLinear, even_part
from manylora.tp_worker.layers.norm import RMSNorm
from manylora.tp_worker.layers.rotary import rotary_table
from manylora.tp_worker.layers.shard import Shards
from manylora.tp_worker.step_inputs import StepInputs

LoRALayer = ColumnParallelLinear | RowParallelLinear


class Decoder:
    """One rank's share of the model, its weights empty until loaded through `shards`."""

    def __init__(self, config: ModelConfig, *, group: TPGroup, dtype: torch.dtype) -> None:
        config.check_tp(group.size)
        self.config = config
        cos_sin = rotary_table(config.rope, config.head_dim, config.max_position_embeddings, group.device)
        vocab, hidden = config.vocab_size, config.hidden_size
        embed = head = VocabParallelWeight(vocab, hidden, group=group, dtype=dtype)
        if not config.tie_word_embeddings:
            head = VocabParallelWeight(vocab, hidden, group=group, dtype=dtype)
        self.embed_tokens = VocabParallelEmbedding(embed)
        self.layers = [
            DecoderLayer(config, cos_sin, group=group, dtype=dtype) for _ in range(config.num_layers)
        ]
        self.norm = RMSNorm(hidden, config.rms_norm_eps, dtype=dtype, device=group.device)
        self.lm_head = LMHead(head)

    @torch.inference_mode()
    def forward(self, inputs: StepInputs, kv_cache: Tensor) -> Tensor:
        """One step: (T, hidden_size) after the final norm, the same on every rank; (R, hidden_size), of each row's last
        token, where the step is narrowed.

        kv_cache (pages, num_layers, 2, kv_heads of the rank, page_size, head_dim), any page stride; the step's K and
        V are written to `inputs.kv_slots` of it.
        """
        residual = self.embed_tokens(inputs.token_ids)
        x, addend = self.layers[0].input_norm(residual), None
        for index, layer in enumerate(self.layers):
            if index:
                x = layer.input_norm.add(x, residual, addend)
            q = layer.attention.project(x, inputs, kv_cache[:, index])
            if layer is self.layers[-1] and inputs.narrowed is not None:
                tokens, inputs = inputs.narrowed.tokens, inputs.narrowed.inputs
                q, residual = q[tokens], residual[tokens]
            x, addend = layer(q, residual, inputs, kv_cache[:, index])
        return self.norm.add(x, residual, addend)

    @torch.inference_mode()
    def logits(self, hidden_rows: Tensor, out: Tensor | None = None) -> Tensor:
        """(n, hidden_size) of `forward` -> (n, vocab_size) of the same dtype, contiguous, bit-identical on every rank.

        `out`: where they go, if not to a new tensor.
        """
        return self.lm_head(hidden_rows, out)

    def lora_sites(self) -> Iterator[tuple[int, int, LoRALayer]]:
        """(layer, index in `lora.page_layout.SITES`, the layer object whose `lora` field takes the delta)."""
        for index, layer in enumerate(self.layers):
            sites = (
                layer.attention.qkv_proj,
                layer.attention.o_proj,
                layer.mlp.gate_up_proj,
                layer.mlp.down_proj,
            )
            for site, module in enumerate(sites):
                yield index, site, module

    def shards(self) -> Shards:
        """Every weight of this rank, by its name in a Hugging Face checkpoint."""
        yield from self.embed_tokens.weight.shards("model.embed_tokens.weight")
        for index, layer in enumerate(self.layers):
            yield from layer.shards(f"model.layers.{index}.")
        yield from self.norm.shards("model.norm")
        if not self.config.tie_word_embeddings:
            yield from self.lm_head.weight.shards("lm_head.weight")


class DecoderLayer:
    """Attention and feed-forward, each behind a norm. What comes before the queries are there is the caller's to apply."""

    def __init__(self, config: ModelConfig, cos_sin: Tensor, *, group: TPGroup, dtype: torch.dtype) -> None:
        self.input_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=group.device)
        self.attention = Attention(config, cos_sin, group=group, dtype=dtype)
        self.mlp_norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype=dtype, device=group.device)
        self.mlp = MLP(config, group=group, dtype=dtype)

    def __call__(self, q: Tensor, residual: Tensor, inputs: StepInputs, kv_cache: Tensor) -> Product:
        """q (T, heads, head_dim): `attention.project` of the residual after `input_norm`. Returns what is still to be
        added to the residual.
        """
        x, addend = self.attention.attend(q, inputs, kv_cache)
        x = self.mlp_norm.add(x, residual, addend)
        return self.mlp(x, inputs.lora)

    def shards(self, prefix: str) -> Shards:
        yield from self.input_norm.shards(f"{prefix}input_layernorm")
        yield from self.attention.shards(f"{prefix}self_attn.")
        yield from self.mlp_norm.shards(f"{prefix}post_attention_layernorm")
        yield from self.mlp.shards(f"{prefix}mlp.")


class MLP:
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, config: ModelConfig, *, group: TPGroup, dtype: torch.dtype) -> None:
        hidden, inter, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        parts = (even_part("gate_proj", inter, group), even_part("up_proj", inter, group))
        self.gate_up_proj = ColumnParallelLinear(hidden, parts, bias=bias, group=group, dtype=dtype)
        self.down_proj = RowParallelLinear("down_proj", inter, hidden, bias=bias, group=group, dtype=dtype)

    def __call__(self, x: Tensor, batch: LoRABatch | None) -> Product:
        return self.down_proj(silu_and_mul(*self.gate_up_proj(x, batch)), batch)

    def shards(self, prefix: str) -> Shards:
        yield from self.gate_up_proj.shards(prefix)
        yield from self.down_proj.shards(prefix)
