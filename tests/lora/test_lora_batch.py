"""A step's segments, when one token is left of each row."""

from __future__ import annotations

import pytest
import torch

from manylora.lora.lora_batch import LoRABatch

OFFSETS = [0, 3, 4, 9, 10]  # rows of 3, 1, 5, 1 and 2 tokens


@pytest.mark.parametrize(
    ("segments", "expected"),
    [
        ([], []),
        ([(0, 12, 0, 1)], [(0, 5, 0, 1)]),
        ([(0, 3, 0, 2), (4, 10, 2, 1)], [(0, 1, 0, 2), (2, 4, 2, 1)]),
        ([(3, 4, 0, 1), (4, 9, 1, 3), (10, 12, 4, 1)], [(1, 2, 0, 1), (2, 3, 1, 3), (4, 5, 4, 1)]),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_segments_become_runs_of_rows(
    segments: list[tuple[int, ...]], expected: list[tuple[int, ...]], dtype: torch.dtype
) -> None:
    of_tokens = torch.tensor(segments, dtype=dtype).view(-1, 4)
    slices = torch.arange(5, dtype=dtype)
    rows = torch.tensor([(7, 0, 1, offset) for offset in OFFSETS])
    batch = LoRABatch(of_tokens, slices, 3).of_rows(rows[:, 3])
    assert batch.segments.tolist() == [list(segment) for segment in expected]
    assert batch.segments.dtype == dtype
    assert (batch.slices.tolist(), batch.max_slices, batch.work) == (slices.tolist(), 3, None)
    assert of_tokens.tolist() == [list(segment) for segment in segments], "the step's own are as they were"
