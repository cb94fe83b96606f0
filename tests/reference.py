"""The oracle: transformers + PEFT in fp32, on the CPU, one request at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel

from tests.tiny_models import peft_warnings_ignored

CLEAR_MARGIN = 2e-3  # logits; below it a correct server may well choose the other token


@dataclass(frozen=True)
class Answer:
    """A greedy continuation. `logprobs[i]` is the distribution of token i + 1 of prompt and answer: (len - 1, vocab)."""

    input_ids: list[int]
    tokens: list[int]
    logprobs: torch.Tensor
    margin: float  # the smallest lead of a chosen token over the runner-up

    def output_logprobs(self) -> list[float]:
        """The logprob of each generated token."""
        first = len(self.input_ids) - 1
        return [float(self.logprobs[first + i, token]) for i, token in enumerate(self.tokens)]

    def prompt_logprobs(self) -> list[float]:
        """The logprob of each prompt token but the first."""
        return [float(self.logprobs[i, token]) for i, token in enumerate(self.input_ids[1:])]


class Reference:
    """One base model with any number of adapters."""

    def __init__(self, model_dir: Path) -> None:
        self._model: Any = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
        self._model.eval()
        self._loaded: set[str] = set()
        self._answers: dict[tuple[str | None, tuple[int, ...], int, tuple[int, ...]], Answer] = {}

    @torch.inference_mode()
    def generate(
        self,
        adapter_dir: Path | None,
        input_ids: Sequence[int],
        num_tokens: int,
        stop_ids: Sequence[int] = (),
    ) -> Answer:
        """Greedy tokens of the base model or of an adapter, ending after a token of `stop_ids`; remembered."""
        key = (str(adapter_dir) if adapter_dir else None, tuple(input_ids), num_tokens, tuple(stop_ids))
        if key not in self._answers:
            self._answers[key] = self._generate(adapter_dir, list(input_ids), num_tokens, stop_ids)
        return self._answers[key]

    @torch.inference_mode()
    def logits(self, adapter_dir: Path | None, token_ids: Sequence[int]) -> torch.Tensor:
        """(tokens, vocab): after each token."""
        self._select(adapter_dir)
        return self._forward(list(token_ids))

    def _generate(
        self, adapter_dir: Path | None, input_ids: list[int], num_tokens: int, stop_ids: Sequence[int]
    ) -> Answer:
        self._select(adapter_dir)
        token_ids, margin = list(input_ids), float("inf")
        while True:
            logits = self._forward(token_ids)
            best = logits[-1].topk(2)
            margin = min(margin, float(best.values[0] - best.values[1]))
            token_ids.append(int(best.indices[0]))
            if len(token_ids) == len(input_ids) + num_tokens or token_ids[-1] in stop_ids:
                return Answer(input_ids, token_ids[len(input_ids) :], logits.log_softmax(-1), margin)

    def _forward(self, token_ids: list[int]) -> torch.Tensor:
        return self._model(torch.tensor([token_ids]), use_cache=False).logits[0].float()

    def _select(self, adapter_dir: Path | None) -> None:
        if adapter_dir is None:
            if self._loaded:
                self._model.base_model.disable_adapter_layers()
            return
        name = str(adapter_dir).replace(".", "_")
        if name not in self._loaded:
            with peft_warnings_ignored():
                if self._loaded:
                    self._model.load_adapter(adapter_dir, adapter_name=name)
                else:
                    self._model = PeftModel.from_pretrained(self._model, adapter_dir, adapter_name=name)
            self._model.eval()
            self._loaded.add(name)
        self._model.base_model.enable_adapter_layers()
        self._model.set_adapter(name)


def clear_prompts(
    reference: Reference,
    adapter_dirs: Sequence[Path | None],
    *,
    lengths: Sequence[int],
    num_tokens: int,
    seed: int,
) -> list[list[int]]:
    """One random prompt per length whose greedy answers have clear margins under every one of the adapters."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = reference.generate(None, [0], 1).logprobs.shape[-1]
    prompts: list[list[int]] = []
    for length in lengths:
        for _ in range(50):
            prompt = torch.randint(3, vocab_size, (length,), generator=generator).tolist()
            answers = (reference.generate(path, prompt, num_tokens) for path in adapter_dirs)
            if all(answer.margin > CLEAR_MARGIN for answer in answers):
                prompts.append(prompt)
                break
        else:
            raise AssertionError(f"no prompt of {length} tokens has clear margins")
    return prompts
