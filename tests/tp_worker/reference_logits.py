"""What transformers says about the sequences of `steps`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.tp_worker.steps import sequences


@torch.inference_mode()
def reference_logits(model_dir: Path, scale: float = 1.0) -> torch.Tensor:
    """Logits as `steps.run_schedule` orders them; every projection's weight, not its bias, is multiplied by `scale`."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    for name, weight in model.named_parameters():
        if name.endswith("proj.weight"):
            weight.mul_(scale)
    ids = sequences(model.config.vocab_size)
    return torch.cat([model(torch.tensor([of_sequence])).logits[0] for of_sequence in ids])
