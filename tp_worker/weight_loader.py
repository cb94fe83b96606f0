"""From a model directory to a decoder with weights: every rank reads its own part of every tensor, and nothing else."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from tqdm import tqdm

from manylora.runtime.config import LoadFormat
from manylora.runtime.errors import ModelNotFoundError, ModelUnsupportedError, OutOfMemoryError
from manylora.runtime.model_config import ModelConfig
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.shard import Shard
from manylora.tp_worker.models.decoder import Decoder

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_FLOAT_TYPES = ("F32", "F16", "BF16")
_DUMMY_STD = 0.02


@torch.inference_mode()
def load_model(
    config: ModelConfig,
    model_dir: str | Path,
    load_format: LoadFormat,
    dtype: torch.dtype,
    device: torch.device,
    group: TPGroup,
    seed: int,
    progress: bool,
) -> Decoder:
    """This rank's decoder in `dtype` on `device` (the group's own).

    `dummy` reads nothing and draws random weights, the same in every run of one seed. `progress` shows a bar on stderr.
    Raises ModelNotFoundError (no weights there), ModelUnsupportedError (weights that do not fit the config, by name)
    and OutOfMemoryError.
    """
    assert device == group.device
    with _memory_errors(device):
        decoder = Decoder(config, group=group, dtype=dtype)
        shards = dict(decoder.shards())
        if load_format == "dummy":
            _fill_randomly(shards, seed)
        else:
            _read_checkpoint(Path(model_dir), shards, config.tie_word_embeddings, progress)
    return decoder


def _read_checkpoint(directory: Path, shards: dict[str, Shard], tied: bool, progress: bool) -> None:
    """Fill every shard from the directory's files, each exactly once."""
    missing = dict(shards)
    total = sum(_num_bytes(shard) for shard in shards.values())
    with tqdm(total=total, desc="loading weights", unit="B", unit_scale=True, disable=not progress) as bar:
        for path in _weight_files(directory):
            for name in _read_file(path, shards, missing, tied):
                bar.update(_num_bytes(shards[name]))
    if missing:
        raise ModelUnsupportedError(
            f"{directory} has no weight {next(iter(missing))} ({len(missing)} missing)"
        )


def _read_file(path: Path, shards: dict[str, Shard], missing: dict[str, Shard], tied: bool) -> Iterator[str]:
    """Load the file's tensors, taking each out of `missing`; yields the names."""
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  not a dict
                if _is_redundant(name, tied):
                    continue
                if name not in missing:
                    reason = "is there twice" if name in shards else "is not part of the model"
                    raise ModelUnsupportedError(f"{path}: weight {name} {reason}")
                shard, source = missing.pop(name), file.get_slice(name)
                shape = tuple(source.get_shape())
                if shape != shard.full_shape:
                    raise ModelUnsupportedError(
                        f"{path}: weight {name} has shape {shape}, the config says {shard.full_shape}"
                    )
                if source.get_dtype() not in _FLOAT_TYPES:
                    raise ModelUnsupportedError(
                        f"{path}: weight {name} has type {source.get_dtype()}; supported are {', '.join(_FLOAT_TYPES)}"
                    )
                shard.load(source)
                yield name
    except (SafetensorError, OSError) as error:
        raise ModelUnsupportedError(f"{path} cannot be read: {error}", param="model_path") from error


def _weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model, from its index or the single file."""
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    if not index.exists():
        if not single.exists():
            raise ModelNotFoundError(
                f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}", param="model_path"
            )
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelUnsupportedError(
            f"{index} is not a weight index: {error!r}", param="model_path"
        ) from error
    for name in names:
        if Path(name).name != name:
            raise ModelUnsupportedError(
                f"{index} names a file outside its directory: {name}", param="model_path"
            )
        if not (directory / name).exists():
            raise ModelNotFoundError(f"{directory / name} is in the index but not there", param="model_path")
    return [directory / name for name in names]


def _is_redundant(name: str, tied: bool) -> bool:
    """Old checkpoints store what follows from the config: rotary frequencies, a tied head."""
    return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")


def _fill_randomly(shards: dict[str, Shard], seed: int) -> None:
    """Norms are one, the rest normal. What several ranks hold in common (same name, same start) is equal on all."""
    for name, shard in shards.items():
        if name.endswith("norm.weight"):
            shard.target.fill_(1.0)
            continue
        generator = torch.Generator(shard.target.device)
        generator.manual_seed(zlib.crc32(f"{seed}/{name}/{shard.start}".encode()))
        shard.target.normal_(0.0, _DUMMY_STD, generator=generator)


def _num_bytes(shard: Shard) -> int:
    return shard.target.numel() * shard.target.element_size()


@contextmanager
def _memory_errors(device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(f"the model's weights do not fit on {device}: {error}") from error
