"""Signature adapters: a built model whose every answer names the adapter, so that a mix-up is a wrong token id.

The model is made by hand. Its residual stream has three parts: CONST is the same for every token, CONTENT tells tokens
apart, CODE is empty at the input and is all that lm_head reads: each token has one code, a balanced vector of ±1, and the
token whose code lies in CODE is what the model says. The base model writes the code of BASE_TOKEN, softly.

A signature adapter writes the code of its own token, four times as strong, through one projection (its *path*):

    down      layer 1: the MLP has a constant channel that down_proj reads
    up, gate  layer 1: channels that are 0 in the base (u = 0, or silu(0) = 0) become the code
    o         layer 1: every value vector has a constant channel that o_proj reads
    v         layer 0: the values. Every query looks for the one MARKER token of the prompt and sees nothing else, so
              the token names the adapter that computed the *cached* value there: stale or foreign KV says who wrote it

Its rank is filled: each of its slices writes a strong foreign code too, and these only cancel when all slices of the
same adapter are summed. A missing, stale or foreign slice is a wrong token as well.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.tiny_models import BOS_ID, EOS_ID, VOCAB_SIZE, save_tokenizer

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MIDDLE = 128, 4, 2, 32, 192
NUM_LAYERS = 2
CONST, MARK, FIRST_CONTENT, FIRST_CODE = 0, 1, 2, 64
CODE_SIZE = HIDDEN - FIRST_CODE
MARKER, BASE_TOKEN, FIRST_SIGNATURE = 3, 4, 5
NUM_SIGNATURES = VOCAB_SIZE - FIRST_SIGNATURE
PATHS = ("v", "down", "o", "up", "gate")
QUIET_CHANNEL = HEAD_DIM // 2 - 1  # of a head: the slowest rotary frequency, as good as none
# Channels of layer 1's MLP: one constant, then one set for each of up and gate.
MLP_CONST, FIRST_UP, FIRST_GATE = 0, 1, 1 + CODE_SIZE
SLICE_ROWS = 16  # rows of rank that are stored and multiplied as one
STRENGTH, FOREIGN = 4.0, 8.0  # of an adapter's code, of what its slices must cancel; the base writes 1


@cache
def codes() -> torch.Tensor:
    """(VOCAB_SIZE, CODE_SIZE): balanced ±1 vectors, no two closer than a margin."""
    generator = torch.Generator().manual_seed(0)
    balanced = torch.cat((torch.ones(CODE_SIZE // 2), -torch.ones(CODE_SIZE // 2)))
    chosen: list[torch.Tensor] = []
    while len(chosen) < VOCAB_SIZE:
        code = balanced[torch.randperm(CODE_SIZE, generator=generator)]
        if all(float(code @ other) < 0.45 * CODE_SIZE for other in chosen):
            chosen.append(code)
    return torch.stack(chosen)


def signature_token(adapter: int, version: int = 0, *, num_adapters: int = 24) -> int:
    """The token that version `version` of adapter `adapter` says; neighbours in either never share one."""
    return FIRST_SIGNATURE + (adapter + num_adapters * version) % NUM_SIGNATURES


def build_signature_model(directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Write the checkpoint: a Llama of two layers."""
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=MIDDLE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=2048,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
    )
    model: Any = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" not in name:
                weight.zero_()
        for name, value in _weights(generator).items():
            model.get_parameter(name).copy_(value)
    model.to(dtype=dtype).save_pretrained(directory)
    save_tokenizer(directory)


def build_signature_adapter(
    directory: Path,
    path: str,
    token: int,
    *,
    rank: int = 1,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Write an adapter in PEFT's format that makes the model say `token`."""
    module, layer, channel, first_out, out_size = _PATHS[path]
    code = _split_over_slices(token, rank, seed)
    outputs = torch.zeros(out_size, rank)
    outputs[first_out : first_out + CODE_SIZE] = code
    inputs = torch.zeros(rank, _IN_SIZES[module])
    inputs[:, channel] = 1.0
    directory.mkdir(parents=True)
    name = f"base_model.model.model.layers.{layer}.{module}"
    tensors = {f"{name}.lora_A.weight": inputs.to(dtype), f"{name}.lora_B.weight": outputs.to(dtype)}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": rank,
        "lora_alpha": rank * _PATH_SCALES[path],
        "target_modules": [module.split(".")[1]],
        "layers_to_transform": [layer],
        "layers_pattern": "layers",
        "bias": "none",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))


def signature_prompt(length: int, seed: int) -> list[int]:
    """Token ids with exactly one MARKER, at a random place."""
    generator = torch.Generator().manual_seed(seed)
    prompt = torch.randint(FIRST_SIGNATURE, VOCAB_SIZE, (length,), generator=generator).tolist()
    prompt[int(torch.randint(length, (1,), generator=generator))] = MARKER
    return prompt


def _weights(generator: torch.Generator) -> dict[str, torch.Tensor]:
    embed = torch.zeros(VOCAB_SIZE, HIDDEN)
    embed[:, CONST] = 8.0
    embed[:, FIRST_CONTENT:FIRST_CODE] = torch.randn(
        VOCAB_SIZE, FIRST_CODE - FIRST_CONTENT, generator=generator
    ).sign()
    embed[MARKER, MARK] = 8.0
    head = torch.zeros(VOCAB_SIZE, HIDDEN)
    head[:, FIRST_CODE:] = codes()

    # Layer 0: the query asks for the marker, heads 0 and 2 carry the two halves of the value to CODE.
    query, key = torch.zeros(HEADS * HEAD_DIM, HIDDEN), torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN)
    query[QUIET_CHANNEL::HEAD_DIM, CONST] = 2.0
    key[QUIET_CHANNEL::HEAD_DIM, MARK] = 2.0
    output = torch.zeros(HIDDEN, HEADS * HEAD_DIM)
    for half in range(KV_HEADS):
        head_channels = torch.arange(HEAD_DIM) + half * (HEADS // KV_HEADS) * HEAD_DIM
        output[FIRST_CODE + half * HEAD_DIM + torch.arange(HEAD_DIM), head_channels] = 1.0

    # Layer 1: a constant channel for o_proj, one for down_proj, and closed gates for up and gate.
    value = torch.zeros(KV_HEADS * HEAD_DIM, HIDDEN)
    value[0, CONST] = 0.1
    gate, up = torch.zeros(MIDDLE, HIDDEN), torch.zeros(MIDDLE, HIDDEN)
    gate[MLP_CONST : FIRST_UP + CODE_SIZE, CONST] = 0.5
    up[MLP_CONST, CONST] = 0.02
    up[FIRST_GATE : FIRST_GATE + CODE_SIZE, CONST] = 0.1
    down = torch.zeros(HIDDEN, MIDDLE)
    down[FIRST_CODE:, MLP_CONST] = codes()[BASE_TOKEN]
    code_channels = torch.arange(CODE_SIZE)
    down[FIRST_CODE + code_channels, FIRST_UP + code_channels] = 1.0
    down[FIRST_CODE + code_channels, FIRST_GATE + code_channels] = 1.0
    layer = "model.layers"
    return {
        "model.embed_tokens.weight": embed,
        "lm_head.weight": head,
        f"{layer}.0.self_attn.q_proj.weight": query,
        f"{layer}.0.self_attn.k_proj.weight": key,
        f"{layer}.0.self_attn.o_proj.weight": output,
        f"{layer}.1.self_attn.v_proj.weight": value,
        f"{layer}.1.mlp.gate_proj.weight": gate,
        f"{layer}.1.mlp.up_proj.weight": up,
        f"{layer}.1.mlp.down_proj.weight": down,
    }


def _split_over_slices(token: int, rank: int, seed: int) -> torch.Tensor:
    """(CODE_SIZE, rank): columns that sum to STRENGTH times the token's code.

    Slice i also holds foreign codes f(i) - f(i + 1), in a ring: without slice i, f(i + 1) is louder than the token.
    """
    generator = torch.Generator().manual_seed(seed)
    firsts = range(0, rank, SLICE_ROWS)
    foreign = FOREIGN * codes()[torch.randperm(VOCAB_SIZE, generator=generator)[: len(firsts)]]
    columns = torch.zeros(CODE_SIZE, rank)
    for i, first in enumerate(firsts):
        last = min(first + SLICE_ROWS, rank)
        part = STRENGTH / len(firsts) * codes()[token] + foreign[i] - foreign[(i + 1) % len(firsts)]
        columns[:, first:last] = (part / (last - first))[:, None]
    return columns


# path -> module, layer, the constant input channel, where the code starts in the output, the output's size
_PATHS = {
    "v": ("self_attn.v_proj", 0, CONST, 0, KV_HEADS * HEAD_DIM),
    "down": ("mlp.down_proj", 1, MLP_CONST, FIRST_CODE, HIDDEN),
    "o": ("self_attn.o_proj", 1, 0, FIRST_CODE, HIDDEN),
    "up": ("mlp.up_proj", 1, CONST, FIRST_UP, MIDDLE),
    "gate": ("mlp.gate_proj", 1, CONST, FIRST_GATE, MIDDLE),
}
_IN_SIZES = {
    "self_attn.v_proj": HIDDEN,
    "self_attn.o_proj": HEADS * HEAD_DIM,
    "mlp.down_proj": MIDDLE,
    "mlp.up_proj": HIDDEN,
    "mlp.gate_proj": HIDDEN,
}
# Brings what the adapter writes to about STRENGTH times what the base writes.
_PATH_SCALES = {"v": 0.1, "down": 1.0, "o": 1.0, "up": 0.02, "gate": 0.1}
