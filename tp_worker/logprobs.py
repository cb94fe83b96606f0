"""Logprobs as the model means them: log_softmax of the raw logits in fp32, before penalties, masks and temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Logprobs:
    """Of n tokens, one row each.

    chosen: (n,) float32. top_ids: (n, num_top) int32 and top: (n, num_top) float32, best first; with fewer tokens in
    the vocabulary than asked for, the rest is id -1 at -inf.
    """

    chosen: torch.Tensor
    top_ids: torch.Tensor
    top: torch.Tensor


def raw_logprobs(logits: torch.Tensor) -> torch.Tensor:
    """(n, vocab) of any floating dtype -> (n, vocab) float32, a new tensor."""
    return torch.log_softmax(logits, dim=-1, dtype=torch.float32)


def select_logprobs(logprobs: torch.Tensor, tokens: torch.Tensor, num_top: int) -> Logprobs:
    """Of each row the logprob of its token and the `num_top` best.

    logprobs: (n, vocab) float32; tokens: (n,) int64, all >= 0.
    """
    rows, vocab_size = logprobs.shape
    chosen = logprobs.gather(1, tokens.unsqueeze(1)).squeeze(1)
    top, top_ids = logprobs.topk(min(num_top, vocab_size), dim=-1)
    missing = num_top - top.shape[1]
    if missing > 0:
        top = torch.cat((top, top.new_full((rows, missing), -torch.inf)), dim=1)
        top_ids = torch.cat((top_ids, top_ids.new_full((rows, missing), -1)), dim=1)
    return Logprobs(chosen, top_ids.int(), top)


def join_logprobs(parts: list[Logprobs]) -> Logprobs:
    """Several runs of rows as one."""
    return Logprobs(
        torch.cat([part.chosen for part in parts]),
        torch.cat([part.top_ids for part in parts]),
        torch.cat([part.top for part in parts]),
    )
