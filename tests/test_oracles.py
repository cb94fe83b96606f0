"""The oracles themselves: the tiny models tell adapters apart, and signature adapters say their token under PEFT."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.reference import CLEAR_MARGIN, Reference, clear_prompts
from tests.signature import (
    BASE_TOKEN,
    MARKER,
    PATHS,
    build_signature_adapter,
    build_signature_model,
    signature_prompt,
    signature_token,
)
from tests.tiny_models import ADAPTERS, FAMILIES, TinyModels


@pytest.fixture(scope="module")
def signature_reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp("signature") / "model"
    build_signature_model(directory)
    return Reference(directory)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_adapter_changes_the_answer(tiny_models: TinyModels, family: str) -> None:
    reference = Reference(tiny_models.model(family))
    adapters = [None, *(tiny_models.adapter(family, kind) for kind in ADAPTERS)]
    [prompt] = clear_prompts(reference, adapters, lengths=[20], num_tokens=6, seed=0)
    answers = [reference.generate(adapter, prompt, 6) for adapter in adapters]
    assert len({tuple(answer.tokens) for answer in answers}) == len(adapters)
    assert all(answer.margin > CLEAR_MARGIN for answer in answers)


def test_the_base_of_the_signature_model_says_its_token(signature_reference: Reference) -> None:
    answer = signature_reference.generate(None, signature_prompt(20, seed=0), 3)
    assert answer.tokens == [BASE_TOKEN] * 3


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("rank", [1, 24, 64])
def test_a_signature_adapter_says_its_token(
    signature_reference: Reference, tmp_path: Path, path: str, rank: int
) -> None:
    build_signature_adapter(tmp_path / "adapter", path, 77, rank=rank)
    answer = signature_reference.generate(tmp_path / "adapter", signature_prompt(40, seed=rank), 3)
    assert answer.tokens == [77] * 3
    assert answer.margin > 10  # bf16 keeps it


@pytest.mark.parametrize("path", PATHS)
def test_a_lost_slice_is_a_wrong_token(signature_reference: Reference, tmp_path: Path, path: str) -> None:
    build_signature_adapter(tmp_path / "adapter", path, 77, rank=40)
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(weights)
    for name in tensors:
        if "lora_B" in name:
            tensors[name][:, 16:32] = 0
    save_file(tensors, weights)
    answer = signature_reference.generate(tmp_path / "adapter", signature_prompt(40, seed=1), 1)
    assert answer.tokens != [77]


def test_every_query_sees_only_the_marker(tmp_path: Path) -> None:
    """So a v signature names who wrote the cached value there, and no average over the prompt can hide a stale page."""
    build_signature_model(tmp_path / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model", attn_implementation="eager")
    prompt = signature_prompt(300, seed=3)
    place = prompt.index(MARKER)
    attention = model(torch.tensor([prompt]), output_attentions=True).attentions[0]  # (1, heads, query, key)
    assert (attention[0, :, place:, place] > 0.999).all()


def test_neighbouring_versions_and_adapters_have_different_tokens() -> None:
    tokens = {signature_token(adapter, version) for adapter in range(24) for version in range(12)}
    assert len(tokens) == 24 * 12
    assert min(tokens) > BASE_TOKEN
