"""Rows of logits with every mixture of sampling parameters, for the sampling kernels against their references."""

from __future__ import annotations

import torch

# temperature, top_k (0: off), top_p, min_p
PARAMETERS = (
    (1.0, 0, 1.0, 0.0),
    (0.0, 0, 1.0, 0.0),
    (0.7, 1, 1.0, 0.0),
    (0.7, 50, 1.0, 0.0),
    (1.3, 0, 0.9, 0.0),
    (1.0, 0, 0.3, 0.0),
    (0.2, 0, 1e-6, 0.0),
    (1.0, 0, 1.0, 0.05),
    (1.5, 200, 0.95, 0.01),
    (3.0, 7, 0.999, 0.0),
    (1.0, 300, 1.0, 1.0),
    (100.0, 0, 0.5, 0.0),
)


def sampling_case(
    num_rows: int, vocab: int, device: str = "cpu"
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits and the other arguments of `sample`.

    Every third row has logits as a bfloat16 head gives them, thus many equal ones; some have forbidden tokens; one is
    flat.
    """
    generator = torch.Generator().manual_seed(num_rows * vocab)
    logits = torch.randn(num_rows, vocab, generator=generator) * 3
    logits[::3] = logits[::3].bfloat16().float()
    logits[1::4, ::5] = -torch.inf
    logits[num_rows // 2] = 1.0
    rows = [PARAMETERS[row % len(PARAMETERS)] for row in range(num_rows)]
    temperature, top_k, top_p, min_p = (list(column) for column in zip(*rows, strict=True))
    # Interleaved, as in the slots' entries: a column has a stride.
    floats = torch.tensor([temperature, top_p, min_p]).T.contiguous().to(device)
    top_k = torch.tensor([[k or vocab, 0] for k in top_k]).to(device)[:, 0]
    uniforms = torch.randint(0, 1 << 24, (num_rows,), generator=generator) * 2.0**-24
    arguments = (floats[:, 0], top_k, floats[:, 1], floats[:, 2], uniforms.to(device))
    return logits.to(device), arguments
