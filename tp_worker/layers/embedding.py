"""The two ends of the vocabulary, split over the ranks: token ids in, logits out.

A vocabulary that the ranks do not divide is padded with zero rows; logits of the padding are cut off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.kernels.linear import linear
from manylora.tp_worker.distributed import TPGroup
from manylora.tp_worker.layers.shard import Shard, Shards


class VocabParallelWeight:
    """This rank's rows of a (vocab_size, hidden_size) matrix; an embedding and a tied lm_head share one."""

    def __init__(self, vocab_size: int, hidden_size: int, *, group: TPGroup, dtype: torch.dtype) -> None:
        local = -(-vocab_size // group.size)
        self.vocab_size = vocab_size
        self.group = group
        self.start = group.rank * local
        self.rows = torch.empty((local, hidden_size), dtype=dtype, device=group.device)
        self.num_real = max(0, min(local, vocab_size - self.start))  # the rest is padding
        self.rows[self.num_real :] = 0

    def shards(self, name: str) -> Shards:
        full_shape = (self.vocab_size, self.rows.shape[1])
        yield name, Shard(self.rows[: self.num_real], full_shape, 0, self.start)


class VocabParallelEmbedding:
    """Token ids (T,) -> (T, hidden_size), the same on every rank."""

    def __init__(self, weight: VocabParallelWeight) -> None:
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        rows, group = self.weight.rows, self.weight.group
        if group.size == 1:
            return F.embedding(token_ids, rows)
        local = token_ids - self.weight.start
        elsewhere = (local < 0) | (local >= len(rows))
        found = F.embedding(local.masked_fill(elsewhere, 0), rows)
        return group.all_reduce(found.masked_fill_(elsewhere[:, None], 0))


class LMHead:
    """Hidden rows (n, hidden_size) -> logits (n, vocab_size) of their dtype, whole and bit-identical on every rank."""

    def __init__(self, weight: VocabParallelWeight) -> None:
        self.weight = weight

    def __call__(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """Contiguous; in `out` where it is given."""
        weight, group = self.weight, self.weight.group
        if group.size == 1:
            return linear(hidden, weight.rows, out=out)
        planes = group.all_gather(linear(hidden, weight.rows))  # (size, n, vocab of a rank)
        each = len(weight.rows)
        real = [plane[:, : max(0, weight.vocab_size - rank * each)] for rank, plane in enumerate(planes)]
        return torch.cat(real, dim=1, out=out)
