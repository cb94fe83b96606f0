"""The model and the adapters that benchmarks run: real shapes and random weights, good for speed and never for quality.

Everything is written in seconds, in the formats that the server reads: config.json, a byte-level tokenizer.json, PEFT.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from manylora.lora.page_layout import MODULES, module_sizes
from manylora.runtime.model_config import ModelConfig

_B_STD = 0.02
_LLAMA_3_1_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 128000,
    "dtype": "bfloat16",
    "eos_token_id": [128001, 128008, 128009],
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "rope_theta": 500000.0,
    "vocab_size": 128256,
}
_TINY = _LLAMA_3_1_8B | {
    "bos_token_id": 256,
    "eos_token_id": [257],
    "head_dim": 16,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}


@dataclass(frozen=True)
class Shape:
    """A model, and how much shorter than for the large one its workloads are."""

    config: dict[str, Any]
    divisor: int = 1

    def scaled(self, count: int) -> int:
        """`count` tokens, requests or adapters of a workload, for this model."""
        return max(1, count // self.divisor)


SHAPES = {"llama-8b": Shape(_LLAMA_3_1_8B), "tiny": Shape(_TINY, divisor=16)}


def write_model(directory: Path, shape: Shape) -> None:
    """A directory that `--load-format dummy` serves: the config, and a tokenizer that knows the 256 bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(shape.config))
    vocab = {char: index for index, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def write_adapter(directory: Path, model: ModelConfig, rank: int) -> None:
    """A bfloat16 LoRA of `rank` on all seven projections of every layer, as PEFT saves it."""
    directory.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": list(MODULES)}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(rank)
    tensors: dict[str, torch.Tensor] = {}
    for layer in range(model.num_layers):
        for module, (in_size, out_size) in zip(MODULES, module_sizes(model), strict=True):
            parent = "mlp" if module in ("gate_proj", "up_proj", "down_proj") else "self_attn"
            prefix = f"base_model.model.model.layers.{layer}.{parent}.{module}"
            a = torch.randn(rank, in_size, generator=generator) * in_size**-0.5
            b = torch.randn(out_size, rank, generator=generator) * _B_STD
            tensors[f"{prefix}.lora_A.weight"] = a.bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = b.bfloat16()
    save_file(tensors, directory / "adapter_model.safetensors")


def weight_bytes(model: ModelConfig) -> int:
    """Bytes that a decode step reads of the base model, in bfloat16: every projection and the head."""
    per_layer = sum(in_size * out_size for in_size, out_size in module_sizes(model))
    return 2 * (model.num_layers * per_layer + model.vocab_size * model.hidden_size)


def kv_bytes(model: ModelConfig) -> int:
    """Bytes of one token's KV, in bfloat16."""
    return 2 * model.num_layers * 2 * model.num_kv_heads * model.head_dim


def adapter_bytes(model: ModelConfig, rank: int) -> int:
    """Bytes of an adapter of `rank` on all projections, in bfloat16."""
    return 2 * model.num_layers * rank * sum(map(sum, module_sizes(model)))


def floor_ms(
    model: ModelConfig, batch: int, context: float, ranks: int, *, bandwidth: float, flops: float
) -> float:
    """The least time of a decode step: its bytes over `bandwidth` (bytes/s), or the base products over `flops` if longer.

    context: mean tokens a row attends to; ranks: the sum over the distinct adapters in the batch.
    """
    weights = weight_bytes(model)
    base = max(weights / bandwidth, weights * batch / flops)  # two operations a weight, two bytes a weight
    read = kv_bytes(model) * batch * (context + 1) + adapter_bytes(model, ranks)
    return 1e3 * (base + read / bandwidth)
