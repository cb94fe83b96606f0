"""Rows of logits for greedy drawing: ties within and between the parts of a row, and rows that are not finite."""

from __future__ import annotations

import torch

from manylora.kernels.greedy import draw_greedy_reference
from manylora.kernels.greedy_work import GreedyWork

ENTRY_WIDTH, LAST_TOKEN = 16, 13


class GreedyCase:
    """The arguments of `draw_greedy`: strided slots, and a column of the slots' table as `last_token`."""

    def __init__(self, num_rows: int, vocab: int, dtype: torch.dtype, device: str = "cpu") -> None:
        generator = torch.Generator().manual_seed(num_rows * vocab)
        self.logits = torch.randn(num_rows, vocab, generator=generator).mul(3).to(dtype).to(device)
        ties = torch.randint(vocab, (num_rows, 3), generator=generator)
        self.logits[1::4] = -7.0  # flat
        self.logits[2::4].scatter_(1, ties[2::4].to(device), 50.0)
        self.logits[3::4, -1] = 50.0
        rows = torch.randperm(num_rows + 3, generator=generator)[:num_rows]
        self.slots = torch.stack((rows, rows), 1).to(device)[:, 0]
        self.entries = torch.full((num_rows + 3, ENTRY_WIDTH), -5, dtype=torch.int32, device=device)
        self.last_token = self.entries[:, LAST_TOKEN]
        self.work = GreedyWork(num_rows + 3, vocab, torch.device(device))

    def poison(self) -> torch.Tensor:
        """Break some rows in every way; returns which."""
        rows, vocab = self.logits.shape
        self.logits[0, vocab // 2] = torch.nan
        self.logits[1, -1] = torch.inf
        self.logits[2, 0] = -torch.inf
        self.logits[3] = torch.nan
        self.logits[4] = -torch.inf
        return torch.arange(rows, device=self.logits.device) < 5

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Result and slots' table of the reference."""
        entries = self.entries.clone()
        tokens = draw_greedy_reference(self.logits, self.slots, entries[:, LAST_TOKEN])
        return tokens, entries
