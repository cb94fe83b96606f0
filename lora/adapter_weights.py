"""An adapter's tensors, bound to the modules of this model: every one of them, in the model's dtype, finite.

What can be refused by the two headers is refused before a tensor is read. Then the data passes once through a small
buffer, which the processor's cache holds: digest, check of the values and the copy into the image find it there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
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
_RUN_BYTES = 1 << 20  # read at a time: a processor's own cache holds it

Place = tuple[int, int, int]  # layer, module, A or B


@dataclass(frozen=True, slots=True)
class _Half:
    """A or B of one module."""

    place: Place
    name: str
    module: str  # full name in the base model
    entry: TensorEntry

    @property
    def num_bytes(self) -> int:
        return self.entry.data_offsets[1] - self.entry.data_offsets[0]


class AdapterWeights:
    """A validated adapter whose tensors are still in its file. Ranks and scalings are [layer][module]."""

    def __init__(
        self,
        file: AdapterFile,
        halves: Sequence[_Half],
        dtype: torch.dtype,
        ranks: Ranks,
        scalings: tuple[tuple[float, ...], ...],
    ) -> None:
        self.ranks = ranks
        self.scalings = scalings
        self._file = file
        self._halves = halves  # in the file's order
        self._dtype = dtype

    def read(self) -> Iterator[tuple[Place, torch.Tensor]]:
        """Each lora_a (rank, in) and lora_b (out, rank), in the file's order; it is overwritten after the next is asked for.

        May be used once. Raises AdapterRejectedError for values that are not finite.
        """
        runs = _runs(self._halves)
        memory = torch.empty(max(map(_total_bytes, runs)), dtype=torch.uint8)
        view = memory.numpy().data
        for run in runs:
            num_bytes = _total_bytes(run)
            self._file.read_into(view[:num_bytes])
            values = _checked(memory[:num_bytes].view(_DTYPES[run[0].entry.dtype]), run, self._dtype)
            start = 0
            for half in run:
                rows, columns = half.entry.shape
                yield half.place, values[start : start + rows * columns].view(rows, columns)
                start += rows * columns


def bind_adapter(file: AdapterFile, model: ModelConfig, dtype: torch.dtype) -> AdapterWeights:
    """Validate configuration and header against the model, to read the tensors as `dtype`. Raises AdapterRejectedError."""
    config = parse_adapter_config(file.config)
    halves = _bind_names(read_header(file.read, file.size), model.num_layers)
    sizes = module_sizes(model)
    ranks = [[0] * len(MODULES) for _ in range(model.num_layers)]
    scalings = [[0.0] * len(MODULES) for _ in range(model.num_layers)]
    for layer, module in sorted({place[:2] for place in halves}):
        lora_a, lora_b = _pair(halves, layer, module)
        rank = config.rank(lora_a.module)
        in_size, out_size = sizes[module]
        _check_shape(lora_a, (rank, in_size), config)
        _check_shape(lora_b, (out_size, rank), config)
        ranks[layer][module] = rank
        scalings[layer][module] = config.scaling(lora_a.module)
    in_order = sorted(halves.values(), key=lambda half: half.entry.data_offsets)
    return AdapterWeights(file, in_order, dtype, tuple(map(tuple, ranks)), tuple(map(tuple, scalings)))


def check_limits(ranks: Ranks, args: LoRAArgs, lora_name: str) -> None:
    """Raise AdapterLimitError if the adapter exceeds --max-lora-rank or --lora-target-modules."""
    max_rank = max(max(layer) for layer in ranks)
    modules = {name for layer in ranks for name, rank in zip(MODULES, layer, strict=True) if rank}
    rank_fits = args.max_lora_rank is None or max_rank <= args.max_lora_rank
    modules_fit = args.target_modules is None or modules <= set(args.target_modules)
    if rank_fits and modules_fit:
        return
    raise AdapterLimitError(
        f"LoRA adapter {lora_name} with rank {max_rank} is incompatible with the current LoRA memory pool "
        "configuration. Please ensure that the LoRA adapter's rank is within the configured `--max-lora-rank` and that "
        "the target modules are included in `--lora-target-modules`."
    )


def _bind_names(entries: dict[str, TensorEntry], num_layers: int) -> dict[Place, _Half]:
    """(layer, module, A or B) -> tensor."""
    halves: dict[Place, _Half] = {}
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
        halves[place] = _Half(place, name, match["module"], entry)
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


def _pair(halves: dict[Place, _Half], layer: int, module: int) -> tuple[_Half, _Half]:
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


def _runs(halves: Sequence[_Half]) -> list[list[_Half]]:
    """`halves` cut into runs of one dtype and at most _RUN_BYTES, or of one tensor that is longer."""
    runs: list[list[_Half]] = []
    num_bytes = 0
    for half in halves:
        num_bytes += half.num_bytes
        if not runs or runs[-1][0].entry.dtype != half.entry.dtype or num_bytes > _RUN_BYTES:
            runs.append([])
            num_bytes = half.num_bytes
        runs[-1].append(half)
    return runs


def _total_bytes(run: Sequence[_Half]) -> int:
    return sum(half.num_bytes for half in run)


def _checked(stored: torch.Tensor, run: Sequence[_Half], dtype: torch.dtype) -> torch.Tensor:
    """The values of a run as `dtype`, finite before and after."""
    if not _is_finite(stored):
        name = _first_bad(stored, run)
        raise AdapterRejectedError(f"{name} has values that are not finite", param=name)
    if stored.dtype == dtype:
        return stored
    converted = stored.to(dtype)
    if not _is_finite(converted):
        name = _first_bad(converted, run)
        raise AdapterRejectedError(
            f"{name} has values beyond the range of {str(dtype).removeprefix('torch.')}", param=name
        )
    return converted


def _first_bad(values: torch.Tensor, run: Sequence[_Half]) -> str:
    """The name of the first tensor of a run that is not finite; there is one."""
    parts = values.split([math.prod(half.entry.shape) for half in run])
    return next(half.name for half, part in zip(run, parts, strict=True) if not _is_finite(part))


def _is_finite(tensor: torch.Tensor) -> bool:
    # By the extremes, which NaN passes through: one pass, tens of times faster than isfinite in 16 bits.
    low, high = tensor.aminmax()
    return math.isfinite(low.item()) and math.isfinite(high.item())
