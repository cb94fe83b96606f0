"""An adapter's tensors, bound to the modules of this model: every one of them, in the model's dtype, finite."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from manylora.lora.adapter_config import AdapterConfig, parse_adapter_config
from manylora.lora.adapter_file import AdapterFile
from manylora.lora.page_layout import MODULES, A, B, Ranks, module_sizes
from manylora.lora.safetensors_header import TensorEntry, read_header
from manylora.runtime.config import LoRAArgs
from manylora.runtime.errors import AdapterLimitError, AdapterRejectedError
from manylora.runtime.model_config import ModelConfig

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# PEFT's name of a tensor. PEFT puts base_model.model before the module's name in the base model; other tools do not.
_TENSOR_NAME = re.compile(
    r"(?:base_model\.model\.)?"
    r"(?P<module>(?:model\.)?layers\.(?P<layer>0|[1-9]\d{0,4})\.(?:self_attn|mlp)\.(?P<projection>[a-z]+_proj))"
    r"\.lora_(?P<which>[AB])(?:\.default)?\.weight"
)
_PARENTS = {name: "mlp" if name in ("gate_proj", "up_proj", "down_proj") else "self_attn" for name in MODULES}
_NAMES_SHOWN = 5


@dataclass(frozen=True, slots=True)
class AdapterWeights:
    """`tensors[layer, module]` is (lora_a (rank, in), lora_b (out, rank)); ranks and scalings are [layer][module]."""

    tensors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
    ranks: Ranks
    scalings: tuple[tuple[float, ...], ...]

    @property
    def max_rank(self) -> int:
        return max(max(layer) for layer in self.ranks)

    @property
    def modules(self) -> frozenset[str]:
        return frozenset(MODULES[module] for _, module in self.tensors)


@dataclass(slots=True)
class _Half:
    """A or B of one module, before it is read."""

    name: str
    module: str  # full name in the base model
    entry: TensorEntry


def bind_adapter(file: AdapterFile, model: ModelConfig, dtype: torch.dtype) -> AdapterWeights:
    """Validate both files against the model and give their tensors in `dtype`. Raises AdapterRejectedError."""
    config = parse_adapter_config(file.config)
    entries, data_start = read_header(file.weights)
    halves = _bind_names(entries, model.num_layers)
    sizes = module_sizes(model)
    tensors: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
    ranks = [[0] * len(MODULES) for _ in range(model.num_layers)]
    scalings = [[0.0] * len(MODULES) for _ in range(model.num_layers)]
    for layer, module in sorted({place[:2] for place in halves}):
        lora_a, lora_b = _pair(halves, layer, module)
        rank = config.rank(lora_a.module)
        in_size, out_size = sizes[module]
        _check_shape(lora_a, (rank, in_size), config)
        _check_shape(lora_b, (out_size, rank), config)
        tensors[layer, module] = (
            _read_tensor(file.weights, data_start, lora_a, dtype),
            _read_tensor(file.weights, data_start, lora_b, dtype),
        )
        ranks[layer][module] = rank
        scalings[layer][module] = config.scaling(lora_a.module)
    return AdapterWeights(tensors, tuple(map(tuple, ranks)), tuple(map(tuple, scalings)))


def check_limits(weights: AdapterWeights, args: LoRAArgs, lora_name: str) -> None:
    """Raise AdapterLimitError if the adapter exceeds --max-lora-rank or --lora-target-modules."""
    rank_fits = args.max_lora_rank is None or weights.max_rank <= args.max_lora_rank
    modules_fit = args.target_modules is None or weights.modules <= set(args.target_modules)
    if rank_fits and modules_fit:
        return
    raise AdapterLimitError(
        f"LoRA adapter {lora_name} with rank {weights.max_rank} is incompatible with the current LoRA memory pool "
        "configuration. Please ensure that the LoRA adapter's rank is within the configured `--max-lora-rank` and that "
        "the target modules are included in `--lora-target-modules`."
    )


def _bind_names(entries: dict[str, TensorEntry], num_layers: int) -> dict[tuple[int, int, int], _Half]:
    """(layer, module, A or B) -> tensor."""
    halves: dict[tuple[int, int, int], _Half] = {}
    unbound: list[str] = []
    for name, entry in entries.items():
        match = _TENSOR_NAME.fullmatch(name)
        if match is None or not _is_in_model(match, num_layers):
            unbound.append(name)
            continue
        place = (int(match["layer"]), MODULES.index(match["projection"]), A if match["which"] == "A" else B)
        if place in halves:
            raise AdapterRejectedError(
                f"the adapter has two tensors for one place: {halves[place].name} and {name}", param=name
            )
        halves[place] = _Half(name, match["module"], entry)
    if unbound:
        more = f" and {len(unbound) - _NAMES_SHOWN} more" if len(unbound) > _NAMES_SHOWN else ""
        raise AdapterRejectedError(
            "the adapter has tensors that belong to no supported module of this model "
            f"({', '.join(MODULES)} of {num_layers} layers): {', '.join(unbound[:_NAMES_SHOWN])}{more}",
            param=unbound[0],
        )
    return halves


def _is_in_model(match: re.Match[str], num_layers: int) -> bool:
    parent = match["module"].split(".")[-2]
    return int(match["layer"]) < num_layers and _PARENTS.get(match["projection"]) == parent


def _pair(halves: dict[tuple[int, int, int], _Half], layer: int, module: int) -> tuple[_Half, _Half]:
    lora_a, lora_b = halves.get((layer, module, A)), halves.get((layer, module, B))
    if lora_a is None or lora_b is None:
        missing = "lora_A" if lora_a is None else "lora_B"
        raise AdapterRejectedError(f"the adapter has no {missing} for layer {layer} {MODULES[module]}")
    return lora_a, lora_b


def _check_shape(half: _Half, expected: tuple[int, int], config: AdapterConfig) -> None:
    if half.entry.shape != expected:
        raise AdapterRejectedError(
            f"{half.name} has shape {list(half.entry.shape)}; this model and the adapter's config "
            f"(r={config.r}) need {list(expected)}",
            param=half.name,
        )


def _read_tensor(data: bytearray, data_start: int, half: _Half, dtype: torch.dtype) -> torch.Tensor:
    entry = half.entry
    rows, columns = entry.shape
    stored = torch.frombuffer(
        data, dtype=_DTYPES[entry.dtype], count=rows * columns, offset=data_start + entry.data_offsets[0]
    ).view(rows, columns)
    if not _is_finite(stored):
        raise AdapterRejectedError(f"{half.name} has values that are not finite", param=half.name)
    if stored.dtype == dtype:
        return stored
    converted = stored.to(dtype)
    if not _is_finite(converted):
        raise AdapterRejectedError(
            f"{half.name} has values beyond the range of {str(dtype).removeprefix('torch.')}", param=half.name
        )
    return converted


def _is_finite(tensor: torch.Tensor) -> bool:
    # By the extremes, which NaN passes through: one pass, tens of times faster than isfinite in 16 bits.
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
