"""Checkpoints that do not fit the config are refused by name; dummy weights are reproducible."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from manylora.runtime.config import LoadFormat
from manylora.runtime.errors import ModelNotFoundError, ModelUnsupportedError
from manylora.runtime.model_config import load_model_config
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.shard import Shard
from manylora.tp_worker.models.decoder import Decoder
from manylora.tp_worker.weight_loader import INDEX_FILE, SINGLE_FILE, load_model
from tests.tiny_models import TinyModels

torch.set_num_threads(1)
CPU = torch.device("cpu")
Weights = dict[str, torch.Tensor]
GATE = "model.layers.0.mlp.gate_proj.weight"


def load(
    model_dir: Path, load_format: LoadFormat = "auto", rank: int = 0, size: int = 1, seed: int = 0
) -> Decoder:
    """One rank's model; loading needs no other rank."""
    config = load_model_config(model_dir)
    return load_model(
        config,
        model_dir,
        load_format,
        torch.float32,
        CPU,
        TPGroup(rank, size, CPU),
        seed=seed,
        progress=False,
    )


@pytest.fixture
def checkpoint(tiny_models: TinyModels, tmp_path: Path) -> Path:
    """A copy of the tied model, in one file, to be spoilt."""
    source = tiny_models.model("qwen2")
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    save_file(load_file(source / SINGLE_FILE), tmp_path / SINGLE_FILE)
    return tmp_path


def spoil(directory: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(directory / SINGLE_FILE)
    change(weights)
    save_file(weights, directory / SINGLE_FILE)


def set_weight(name: str, value: torch.Tensor) -> Callable[[Weights], object]:
    return lambda weights: weights.update({name: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda weights: weights.pop(GATE), f"no weight {GATE} ", id="missing"),
        pytest.param(
            set_weight("model.extra.bias", torch.ones(2)), "model.extra.bias is not part", id="extra"
        ),
        pytest.param(set_weight(GATE, torch.ones(3, 4)), rf"{GATE} has shape \(3, 4\)", id="shape"),
        pytest.param(
            set_weight(GATE, torch.ones(96, 64, dtype=torch.int8)), f"{GATE} has type I8", id="quantized"
        ),
    ],
)
def test_refuses_by_name(checkpoint: Path, change: Callable[[Weights], object], message: str) -> None:
    spoil(checkpoint, change)
    with pytest.raises(ModelUnsupportedError, match=message):
        load(checkpoint)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"])
def test_ignores_what_the_config_implies(checkpoint: Path, name: str) -> None:
    expected = load(checkpoint)
    spoil(checkpoint, set_weight(name, torch.ones(2)))
    assert equal_weights(load(checkpoint), expected)


def test_refuses_a_weight_that_two_files_hold(checkpoint: Path) -> None:
    save_file({GATE: torch.ones(96, 64)}, checkpoint / "more.safetensors")
    write_index(checkpoint, {"a": SINGLE_FILE, GATE: "more.safetensors"})
    with pytest.raises(ModelUnsupportedError, match="is there twice"):
        load(checkpoint)


def test_refuses_a_torn_file(checkpoint: Path) -> None:
    path = checkpoint / SINGLE_FILE
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ModelUnsupportedError, match=r"model\.safetensors cannot be read"):
        load(checkpoint)


def test_says_when_there_are_no_weights(checkpoint: Path) -> None:
    (checkpoint / SINGLE_FILE).unlink()
    with pytest.raises(ModelNotFoundError, match="has neither"):
        load(checkpoint)
    write_index(checkpoint, {GATE: "gone.safetensors"})
    with pytest.raises(ModelNotFoundError, match=r"gone\.safetensors is in the index"):
        load(checkpoint)


def test_refuses_an_index_that_leads_elsewhere(checkpoint: Path) -> None:
    write_index(checkpoint, {GATE: "../model.safetensors"})
    with pytest.raises(ModelUnsupportedError, match="outside its directory"):
        load(checkpoint)


def test_refuses_an_index_that_is_none(checkpoint: Path) -> None:
    (checkpoint / INDEX_FILE).write_text("[]")
    with pytest.raises(ModelUnsupportedError, match="is not a weight index"):
        load(checkpoint)


def test_a_rank_without_vocabulary_loads(checkpoint: Path) -> None:
    """9 tokens on 4 ranks: 3 each, so the last has padding only."""
    spoil(checkpoint, set_weight("model.embed_tokens.weight", torch.randn(9, 64)))
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "vocab_size": 9}))
    last = load(checkpoint, rank=3, size=4).embed_tokens.weight.rows
    assert last.shape == (3, 64)
    assert not last.any()


def test_dummy_weights_follow_the_seed_and_read_no_file(checkpoint: Path) -> None:
    (checkpoint / SINGLE_FILE).unlink()
    one, same, other = (load(checkpoint, "dummy", seed=seed) for seed in (1, 1, 2))
    assert equal_weights(one, same)
    assert not equal_weights(one, other)
    q, k = dict(one.shards())["model.layers.0.self_attn.q_proj.weight"].target, one.norm.weight
    assert 0.01 < q.std() < 0.03
    assert torch.equal(k, torch.ones_like(k))


def test_dummy_weights_that_ranks_share_are_equal(checkpoint: Path) -> None:
    """Two KV heads on four ranks: neighbours have the same K, others not; norms are everywhere alike."""
    ranks = [dict(load(checkpoint, "dummy", rank, 4).shards()) for rank in range(4)]
    k = [shards["model.layers.0.self_attn.k_proj.weight"].target for shards in ranks]
    assert torch.equal(k[0], k[1])
    assert torch.equal(k[2], k[3])
    assert not torch.equal(k[0], k[2])


def test_progress_goes_to_stderr(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = load_model_config(checkpoint)
    load_model(config, checkpoint, "auto", torch.float32, CPU, TPGroup(0, 1, CPU), seed=0, progress=True)
    captured = capfd.readouterr()
    assert "loading weights: 100%" in captured.err
    assert not captured.out


@pytest.mark.parametrize(("dim", "start"), [(0, 2), (1, 3)])
def test_a_shard_cuts_its_part(dim: int, start: int) -> None:
    full = torch.arange(48.0).view(6, 8)
    target = torch.empty((2, 8) if dim == 0 else (6, 2))
    Shard(target, (6, 8), dim, start).load(full)
    assert torch.equal(target, full.narrow(dim, start, 2))


def equal_weights(one: Decoder, other: Decoder) -> bool:
    others = dict(other.shards())
    return all(torch.equal(shard.target, others[name].target) for name, shard in one.shards())


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX_FILE).write_text(json.dumps({"weight_map": weight_map}))
