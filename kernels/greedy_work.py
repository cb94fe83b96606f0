"""Memory in which the programs of a greedy draw meet."""

from __future__ import annotations

import torch

PART = 8192  # tokens of a row that one program looks at


class GreedyWork:
    """What the programs of one draw tell each other: room for `num_rows` rows. For one draw at a time.

    best (num_rows, parts) float32 and token (num_rows, parts) int32: what was found in each part of a row.
    arrived: (num_rows,) int32: how many parts are done; zero before and after a draw.
    """

    def __init__(self, num_rows: int, vocab_size: int, device: torch.device) -> None:
        self.num_parts = -(-vocab_size // PART)
        self.best = torch.empty((num_rows, self.num_parts), dtype=torch.float32, device=device)
        self.token = torch.empty((num_rows, self.num_parts), dtype=torch.int32, device=device)
        self.arrived = torch.zeros(num_rows, dtype=torch.int32, device=device)
