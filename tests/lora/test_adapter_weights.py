"""Every tensor of an adapter finds its module, with the right rank and scaling, or the adapter is refused."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from manylora.lora.adapter_weights import check_limits
from manylora.lora.page_layout import MODULES, A, B, O, Q
from manylora.runtime.config import LoRAArgs
from manylora.runtime.errors import AdapterLimitError, AdapterRejectedError
from manylora.runtime.model_config import load_model_config
from tests.lora.adapters import (
    WholeWeights,
    bind_files,
    named_tensors,
    random_weights,
    same_ranks,
    small_model,
    tensor_name,
    write_adapter,
)
from tests.tiny_models import ADAPTERS, TinyModels, peft_warnings_ignored

MODEL = small_model()
Q0_A, Q0_B = tensor_name(0, Q, "A"), tensor_name(0, Q, "B")


def q_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    return {Q0_A: torch.ones(8, 32, dtype=dtype), Q0_B: torch.ones(32, 8, dtype=dtype)}


def bind(directory: Path, tensors: dict[str, torch.Tensor], **config: Any) -> WholeWeights:
    return bind_files(write_adapter(directory, tensors, **config), MODEL, torch.float32)


@pytest.mark.parametrize("kind", ADAPTERS)
def test_what_peft_wrote_is_what_peft_computes(tiny_models: TinyModels, kind: str) -> None:
    """Each module's scaling · B·A equals the delta weight of PEFT's own layer."""
    family = "llama"
    directory = tiny_models.adapter(family, kind)
    model_dir = tiny_models.model(family)
    weights = bind_files(directory, load_model_config(model_dir), torch.float32)
    base = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    with peft_warnings_ignored():
        oracle = peft.PeftModel.from_pretrained(base, str(directory))
    seen = 0
    for name, layer in oracle.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        parts = name.split(".")
        place = (int(parts[parts.index("layers") + 1]), MODULES.index(parts[-1]))
        lora_a, lora_b = weights.tensors[place]
        delta = weights.scalings[place[0]][place[1]] * (lora_b @ lora_a)
        torch.testing.assert_close(delta, layer.get_delta_weight("default").float(), rtol=1e-6, atol=1e-6)
        assert weights.ranks[place[0]][place[1]] == len(lora_a)
        seen += 1
    assert seen == len(weights.tensors) > 0
    assert sum(rank > 0 for layer in weights.ranks for rank in layer) == seen


@pytest.mark.parametrize(
    "rename",
    [
        lambda name: name,
        lambda name: name.removeprefix("base_model.model."),
        lambda name: name.replace(".weight", ".default.weight"),
        lambda name: name.removeprefix("base_model.model.model."),
    ],
    ids=["peft", "bare", "unsaved-state-dict", "headless"],
)
def test_spellings_of_tensor_names(tmp_path: Path, rename: Any) -> None:
    expected = random_weights(MODEL, same_ranks(8))
    tensors = {rename(name): tensor for name, tensor in named_tensors(expected).items()}
    bound = bind(tmp_path, tensors)
    assert bound.ranks == expected.ranks
    for place, (lora_a, lora_b) in expected.tensors.items():
        assert torch.equal(bound.tensors[place][A], lora_a)
        assert torch.equal(bound.tensors[place][B], lora_b)


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.lm_head.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.model.layers.2.self_attn.q_proj.lora_A.weight",  # the model has two layers
        "base_model.model.model.layers.00.self_attn.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.mlp.q_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.up_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.qkv_proj.lora_A.weight",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.bias",
        "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector",
        "base_model.model.model.layers.0.input_layernorm.weight",
        "base_model.model.vision.layers.0.self_attn.q_proj.lora_A.weight",
    ],
)
def test_a_tensor_without_a_place_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(AdapterRejectedError, match=name) as caught:
        bind(tmp_path, {**q_tensors(), name: torch.ones(8, 32)})
    assert caught.value.param == name


def test_of_many_tensors_without_a_place_five_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejectedError, match=r": x0, x1, x2, x3, x4 and 4 more$"):
        bind(tmp_path, {f"x{i}": torch.ones(1) for i in range(9)})


def test_two_names_for_one_place(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejectedError, match="two tensors for one place"):
        bind(tmp_path, {**q_tensors(), Q0_A.removeprefix("base_model.model."): torch.ones(8, 32)})


@pytest.mark.parametrize(("missing", "half"), [(Q0_A, "lora_A"), (Q0_B, "lora_B")])
def test_half_a_module(tmp_path: Path, missing: str, half: str) -> None:
    tensors = q_tensors()
    del tensors[missing]
    with pytest.raises(AdapterRejectedError, match=f"no {half} for layer 0 q_proj"):
        bind(tmp_path, tensors)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        (Q0_A, (32, 8)),
        (Q0_A, (8, 31)),
        (Q0_A, (4, 32)),
        (Q0_A, (256,)),
        (Q0_A, (1, 8, 32)),
        (Q0_B, (32, 9)),
        (Q0_B, (64, 8)),
    ],
)
def test_wrong_shapes(tmp_path: Path, name: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(AdapterRejectedError, match="has shape") as caught:
        bind(tmp_path, {**q_tensors(), name: torch.ones(shape)})
    assert caught.value.param == name


def test_the_rank_of_the_config_is_the_rank_of_the_file(tmp_path: Path) -> None:
    with pytest.raises(AdapterRejectedError, match=r"need \[4, 32\]"):
        bind(tmp_path, q_tensors(), rank_pattern={"layers.0.self_attn.q_proj": 4})
    with pytest.raises(AdapterRejectedError, match=r"need \[1000000000, 32\]"):
        bind(tmp_path / "huge", q_tensors(), r=10**9)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_not_finite(tmp_path: Path, value: float, stored: torch.dtype) -> None:
    tensors = {name: tensor.to(stored) for name, tensor in q_tensors().items()}
    tensors[Q0_B][3, 3] = value
    with pytest.raises(AdapterRejectedError, match="not finite") as caught:
        bind(tmp_path, tensors)
    assert caught.value.param == Q0_B


def test_values_beyond_the_models_dtype(tmp_path: Path) -> None:
    tensors = q_tensors()
    tensors[Q0_A][0, 0] = 70000.0
    write_adapter(tmp_path, tensors)
    assert bind_files(tmp_path, MODEL, torch.bfloat16).tensors[0, Q][A][0, 0] == 70144.0
    with pytest.raises(AdapterRejectedError, match="beyond the range of float16"):
        bind_files(tmp_path, MODEL, torch.float16)


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    weights = random_weights(MODEL, same_ranks(8, ("o_proj",)), dtype=stored)
    bound = bind_files(write_adapter(tmp_path, named_tensors(weights)), MODEL, wanted)
    assert torch.equal(bound.tensors[1, O][A], weights.tensors[1, O][A].to(wanted))


def test_a_file_in_any_order_and_of_many_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dtypes alternate, runs hold one to all tensors; each tensor arrives whole, and a bad one by its own name."""
    weights = random_weights(MODEL, same_ranks(8))
    dtypes = (torch.float32, torch.float32, torch.bfloat16)
    tensors = {
        name: tensor.to(dtypes[index % 3])
        for index, (name, tensor) in enumerate(named_tensors(weights).items())
    }
    for run_bytes in (1, 3000, 1 << 20):
        monkeypatch.setattr("manylora.lora.adapter_weights._RUN_BYTES", run_bytes)
        bound = bind(tmp_path, tensors)
        for name, tensor in named_tensors(bound).items():
            assert torch.equal(tensor, tensors[name].float())
        for name in [list(tensors)[index] for index in (0, 13, -1)]:
            broken = {**tensors, name: torch.full_like(tensors[name], float("nan"))}
            with pytest.raises(AdapterRejectedError, match="not finite") as caught:
                bind(tmp_path, broken)
            assert caught.value.param == name


def limits(**given: Any) -> LoRAArgs:
    return LoRAArgs(enable_lora=True, **given)


def test_limits_of_the_flags() -> None:
    ranks = same_ranks(24, ("q_proj", "up_proj"))
    check_limits(ranks, limits(), "x")
    check_limits(ranks, limits(max_lora_rank=24, target_modules=("q_proj", "up_proj", "o_proj")), "x")
    for args in (limits(max_lora_rank=23), limits(target_modules=("q_proj",))):
        with pytest.raises(
            AdapterLimitError, match=r"^LoRA adapter x with rank 24 is incompatible with the current"
        ):
            check_limits(ranks, args, "x")
