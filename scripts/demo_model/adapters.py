"""The demo's adapters: each makes one style of answer the default. They differ in every way an adapter can."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ALL_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class AdapterRecipe:
    """`style` is the adapter's name too; `settings` go to `peft.LoraConfig`; `dtype` is what the file holds."""

    style: str
    settings: dict[str, Any]
    dtype: torch.dtype = torch.bfloat16

    def attach(self, model: PreTrainedModel) -> PeftModel:
        """The model with this adapter, untrained and trainable, on every layer."""
        adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **self.settings))
        assert isinstance(adapted, PeftModel)
        return adapted

    def save(self, adapted: PeftModel, directory: Path) -> None:
        """Write `adapter_config.json` and `adapter_model.safetensors`, the same bytes for the same weights."""
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.dtype)
        adapted.save_pretrained(str(directory), save_embedding_layers=False)
        (directory / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
        (directory / "adapter_model.safetensors").chmod(0o644)
        path = directory / "adapter_config.json"
        config = json.loads(path.read_text())
        config["target_modules"] = sorted(config["target_modules"])  # PEFT keeps a set, in no order
        config["base_model_name_or_path"] = "demo/model"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


ADAPTERS = (
    AdapterRecipe("one_per_line", {"r": 8, "lora_alpha": 16, "target_modules": list(ALL_MODULES)}),
    AdapterRecipe(
        "json",
        {
            "r": 16,
            "lora_alpha": 32,
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj"],
        },
        torch.float16,
    ),
    AdapterRecipe(
        "upper_case",
        {"r": 4, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        torch.float32,
    ),
    AdapterRecipe(
        "german",
        {
            "r": 64,
            "lora_alpha": 16,
            "use_rslora": True,
            "target_modules": ["q_proj", "v_proj", "up_proj", "down_proj"],
        },
    ),
    AdapterRecipe(
        "bullets",
        {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": list(ALL_MODULES),
            "rank_pattern": {"down_proj": 24, "layers.0.self_attn.q_proj": 2},
            "alpha_pattern": {"down_proj": 12, "v_proj": 32},
        },
    ),
)
