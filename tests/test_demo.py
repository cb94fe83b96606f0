"""The shipped demo model: it is small, complete, and served with the answers that transformers and PEFT gave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from manylora import Engine

DEMO = Path(__file__).resolve().parent.parent / "demo"
MAX_BYTES = 12_000_000


@pytest.fixture(scope="module")
def answers() -> list[dict[str, Any]]:
    return json.loads((DEMO / "answers.json").read_text(encoding="utf-8"))


def test_demo_is_small_and_has_every_file() -> None:
    files = [path for path in DEMO.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= MAX_BYTES
    names = {str(path.relative_to(DEMO)) for path in files}
    for adapter in ("one_per_line", "json", "upper_case", "german", "bullets"):
        assert {
            f"adapters/{adapter}/adapter_config.json",
            f"adapters/{adapter}/adapter_model.safetensors",
        } <= names
    assert {"model/config.json", "model/model.safetensors", "model/tokenizer.json", "README.md"} <= names


def test_chat_template_is_what_the_model_was_taught() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "model")
    conversation = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == "<|begin|><|user|>Hello<|eot|><|assistant|>"


@pytest.mark.parametrize("tp_size", [1, 2])
def test_served_answers_are_those_of_transformers_and_peft(
    answers: list[dict[str, Any]], tp_size: int
) -> None:
    """All prompts and all adapters in one call: a batch of the base model and five adapters of different kinds."""
    adapters = {one["adapter"] for one in answers} - {None}
    paths = {name: str(DEMO / "adapters" / name) for name in adapters}
    with Engine(str(DEMO / "model"), device="cpu", tp_size=tp_size, lora_paths=paths) as engine:
        served = engine.generate(
            [one["prompt"] for one in answers],
            {"temperature": 0, "max_new_tokens": 160},
            lora_path=[one["adapter"] for one in answers],
        )
    assert [one["output_ids"] for one in served] == [one["output_ids"] for one in answers]
    assert [one["text"] for one in served] == [one["text"] for one in answers]
