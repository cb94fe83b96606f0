"""The product for few rows in Triton against torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from manylora.kernels.linear_triton import Launch, linear

torch.set_num_threads(1)
LAUNCHES = [Launch(64, 64, 4, 2, swapped=True), Launch(32, 32, 4, 1, swapped=False)]


@pytest.mark.parametrize("launch", LAUNCHES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize(("rows", "out", "features"), [(1, 64, 128), (3, 100, 70), (17, 96, 64), (0, 16, 16)])
def test_linear(rows: int, out: int, features: int, with_bias: bool, launch: Launch) -> None:
    storage = torch.full((rows, features + 5), torch.nan, dtype=torch.float16)
    x = storage[:, 2:-3]
    x.copy_(torch.randn(rows, features))
    weight, bias = torch.randn(out, features).half(), torch.randn(out).half() if with_bias else None
    y = linear(x, weight, bias, launch=launch)
    expected = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    torch.testing.assert_close(y.float(), expected, rtol=2e-3, atol=2e-2)


def test_more_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 64 rows"):
        linear(torch.ones(65, 16), torch.ones(16, 16))
