"""Training and greedy decoding for the demo model: every document lies on the device, one padded row each."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from demo_model.tokenization import BEGIN, END, token_id
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that has no loss


@dataclass(frozen=True)
class Recipe:
    """One optimisation: `steps` of `batch_size` documents, learning rate warmed up to `peak_lr`, then cosine to 0."""

    steps: int
    batch_size: int
    peak_lr: float
    weight_decay: float
    seed: int


@dataclass(frozen=True)
class Documents:
    """`ids` and `labels` are (documents, longest); a label stands under the token that predicts it."""

    ids: Tensor
    labels: Tensor
    lengths: list[int]

    @staticmethod
    def encode(
        tokenizer: PreTrainedTokenizerBase, turns: Sequence[Sequence[tuple[str, str]]], device: torch.device
    ) -> Documents:
        """Tokenize documents of (prompt, answer) turns. Only answers have a loss."""
        rows: list[tuple[list[int], list[int]]] = []
        flat = [text for document in turns for turn in document for text in turn]
        encoded = iter(_token_ids(tokenizer, flat, add_special_tokens=False))
        begin, pad = token_id(tokenizer, BEGIN), token_id(tokenizer, END)
        for document in turns:
            ids, taught = [begin], [False]
            for _ in document:
                prompt, answer = next(encoded), next(encoded)
                ids += prompt + answer
                taught += [False] * len(prompt) + [True] * len(answer)
            targets = [token if learn else IGNORED for token, learn in zip(ids[1:], taught[1:], strict=True)]
            rows.append((ids[:-1], targets))
        lengths = [len(ids) for ids, _ in rows]
        longest = max(lengths)
        return Documents(
            torch.tensor([ids + [pad] * (longest - len(ids)) for ids, _ in rows], device=device),
            torch.tensor([row + [IGNORED] * (longest - len(row)) for _, row in rows], device=device),
            lengths,
        )

    def batches(self, batch_size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Endless batches of documents of about equal length, cut to the longest of them."""
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.tensor(self.lengths, dtype=torch.float32)
        batch_size = min(batch_size, len(self.lengths))
        while True:
            jitter = torch.rand(len(lengths), generator=generator) * 8
            order = torch.argsort(lengths + jitter)
            # The last, short batch of an epoch is left out; the jitter leaves out others next time.
            starts = torch.randperm(len(order) // batch_size, generator=generator) * batch_size
            for start in starts.tolist():
                rows = order[start : start + batch_size]
                longest = int(lengths[rows].max())
                rows = rows.to(self.ids.device)
                yield self.ids[rows, :longest], self.labels[rows, :longest]


def _token_ids(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, add_special_tokens: bool
) -> list[list[int]]:
    ids = tokenizer(list(texts), add_special_tokens=add_special_tokens)["input_ids"]
    assert isinstance(ids, list)
    return ids


def train(model: nn.Module, documents: Documents, recipe: Recipe, name: str) -> float:
    """Optimise the model's trainable parameters; returns the mean loss of the last tenth of the steps."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    device = parameters[0].device
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=recipe.peak_lr,
        betas=(0.9, 0.98),
        fused=device.type == "cuda",
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate(step, recipe.steps))
    batches = documents.batches(recipe.batch_size, recipe.seed)
    losses = torch.zeros(recipe.steps, device=device)
    report_every = max(1, recipe.steps // 8)
    started = time.monotonic()
    model.train()
    for step in range(recipe.steps):
        ids, labels = next(batches)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()
        losses[step] = loss.detach()
        if (step + 1) % report_every == 0:
            recent = losses[max(0, step + 1 - report_every) : step + 1].mean().item()
            print(f"  {name}: step {step + 1:5d}  loss {recent:.5f}  {time.monotonic() - started:.0f} s")
    model.eval()
    return losses[-max(1, recipe.steps // 10) :].mean().item()


def _learning_rate(step: int, steps: int) -> float:
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


@dataclass(frozen=True)
class Generated:
    """A greedy answer. `margin`: the smallest lead of a chosen token's logit over the runner-up's."""

    token_ids: list[int]
    text: str
    margin: float


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    end_ids: Sequence[int],
) -> list[Generated]:
    """Greedy answers to all prompts at once. Causal attention and padding on the right need no mask."""
    device = next(model.parameters()).device
    encoded = _token_ids(tokenizer, prompts, add_special_tokens=True)
    lengths = torch.tensor([len(ids) for ids in encoded], device=device)
    longest = int(lengths.max()) + max_new_tokens
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in encoded], device=device)
    rows = torch.arange(len(encoded), device=device)
    margins = torch.full((len(encoded),), torch.inf, device=device)
    ends = torch.tensor(list(end_ids), device=device)
    done = torch.zeros(len(encoded), dtype=torch.bool, device=device)
    position = lengths.clone()
    while not bool(done.all()) and int((position - lengths).max()) < max_new_tokens:
        logits = model(input_ids=ids[:, : int(position.max())], use_cache=False).logits
        best = logits[rows, position - 1].float().topk(2)
        margins = torch.where(done, margins, torch.minimum(margins, best.values[:, 0] - best.values[:, 1]))
        ids[rows, position] = torch.where(done, ids[rows, position], best.indices[:, 0])
        position = torch.where(done, position, position + 1)
        done |= torch.isin(ids[rows, position - 1], ends)
    answers: list[Generated] = []
    for row, start, stop, margin in zip(
        ids.tolist(), lengths.tolist(), position.tolist(), margins.tolist(), strict=True
    ):
        tokens = row[start:stop]
        answers.append(Generated(tokens, str(tokenizer.decode(tokens, skip_special_tokens=True)), margin))
    return answers
