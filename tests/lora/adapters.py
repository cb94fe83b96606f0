"""What the adapter tests share: a small model's shapes, random adapters, their files in PEFT's format, ranks in lockstep."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from manylora.lora.adapter_file import open_adapter
from manylora.lora.adapter_weights import Place, bind_adapter
from manylora.lora.delta import LoRADelta
from manylora.lora.lora_batch import LoRABatch
from manylora.lora.page_layout import (
    MODULES,
    NUM_MODULES,
    A,
    B,
    PoolGeometry,
    Ranks,
    module_sizes,
    pool_geometry,
)
from manylora.runtime.model_config import ModelConfig, RopeConfig

LAYERS = 2


@dataclass(frozen=True)
class WholeWeights:
    """An adapter in memory: `tensors[layer, module]` is (lora_a (rank, in), lora_b (out, rank))."""

    tensors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
    ranks: Ranks
    scalings: tuple[tuple[float, ...], ...]

    def read(self) -> Iterator[tuple[Place, torch.Tensor]]:
        for (layer, module), pair in self.tensors.items():
            for which, tensor in enumerate(pair):
                yield (layer, module, which), tensor


def small_model(kv_heads: int = 2) -> ModelConfig:
    """hidden 32, 4 heads of 8, an intermediate size that is no power of two."""
    return ModelConfig(
        family="llama",
        vocab_size=100,
        hidden_size=32,
        intermediate_size=56,
        num_layers=LAYERS,
        num_heads=4,
        num_kv_heads=kv_heads,
        head_dim=8,
        rms_norm_eps=1e-5,
        rope=RopeConfig(10000.0),
        max_position_embeddings=128,
        tie_word_embeddings=False,
        qkv_bias=False,
        o_bias=False,
        mlp_bias=False,
        qk_norm=False,
        dtype="float32",
        bos_token_id=None,
        eos_token_ids=(),
    )


def small_geometry(model: ModelConfig, tp_size: int, sharding: str, itemsize: int = 4) -> PoolGeometry:
    return pool_geometry(model, tp_size=tp_size, sharding=sharding, page_size=4, itemsize=itemsize)


def same_ranks(rank: int, modules: tuple[str, ...] = MODULES) -> Ranks:
    return tuple(tuple(rank if name in modules else 0 for name in MODULES) for _ in range(LAYERS))


def random_weights(
    model: ModelConfig, ranks: Ranks, seed: int = 0, dtype: torch.dtype = torch.float32
) -> WholeWeights:
    """Normal A and B, another scaling for every module."""
    generator = torch.Generator().manual_seed(seed)
    sizes = module_sizes(model)
    tensors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    scalings = [[0.0] * NUM_MODULES for _ in ranks]
    for layer, layer_ranks in enumerate(ranks):
        for module, rank in enumerate(layer_ranks):
            if rank:
                in_size, out_size = sizes[module]
                lora_a = torch.randn(rank, in_size, generator=generator) * in_size**-0.5
                lora_b = torch.randn(out_size, rank, generator=generator) * rank**-0.5
                tensors[layer, module] = (lora_a.to(dtype), lora_b.to(dtype))
                scalings[layer][module] = 0.5 + 0.25 * (seed + layer + module)
    return WholeWeights(tensors, ranks, tuple(map(tuple, scalings)))


def tensor_name(layer: int, module: int, which: str) -> str:
    parent = "self_attn" if module < 4 else "mlp"
    return f"base_model.model.model.layers.{layer}.{parent}.{MODULES[module]}.lora_{which}.weight"


def named_tensors(weights: WholeWeights) -> dict[str, torch.Tensor]:
    return {
        tensor_name(layer, module, which): tensor
        for (layer, module), pair in weights.tensors.items()
        for which, tensor in zip("AB", pair, strict=True)
    }


def write_adapter(directory: Path, tensors: Mapping[str, torch.Tensor], **config: Any) -> Path:
    """An adapter's two files; `config` over r=8, alpha=16."""
    directory.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], **config}
    (directory / "adapter_config.json").write_text(json.dumps(fields))
    save_file(dict(tensors), directory / "adapter_model.safetensors")
    return directory


def bind_files(directory: Path, model: ModelConfig, dtype: torch.dtype) -> WholeWeights:
    """All that an adapter's files hold for a model."""
    with open_adapter(directory) as file:
        weights = bind_adapter(file, model, dtype)
        halves = {place: tensor.clone() for place, tensor in weights.read()}
    tensors = {place[:2]: (halves[*place[:2], A], halves[*place[:2], B]) for place in halves}
    return WholeWeights(tensors, weights.ranks, weights.scalings)


class LockstepGroup:
    """One rank's end of a tensor-parallel group whose ranks are threads of this process.

    `collectives` counts the rank's calls: they must not depend on the rank's data.
    """

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, board: list[Any]) -> None:
        self.rank = rank
        self.size = size
        self.collectives: list[str] = []
        self._barrier = barrier
        self._board = board

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self.collectives.append("all_gather")
        return torch.stack(self._exchange(x))

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        self.collectives.append("all_reduce")
        return x.copy_(sum(self._exchange(x), torch.zeros_like(x)))

    def _exchange(self, x: torch.Tensor) -> list[torch.Tensor]:
        self._board[self.rank] = x.clone()
        self._barrier.wait(timeout=10)
        everybody = list(self._board)
        self._barrier.wait(timeout=10)
        return everybody


def run_ranks(size: int, run: Callable[[LockstepGroup], Any]) -> list[Any]:
    """`run(group)` of every rank, each in its own thread; their results in rank order."""
    barrier = threading.Barrier(size)
    board: list[Any] = [None] * size
    groups = [LockstepGroup(rank, size, barrier, board) for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, groups))


def add_delta(delta: LoRADelta, x: torch.Tensor, y: torch.Tensor, batch: LoRABatch) -> None:
    """y += the delta of x, as a layer and what reads it have it done around its product."""
    addend = delta.finish(x, delta.begin(x, batch), y, batch)
    if addend is not None:
        y.copy_(addend.added_to(y))
