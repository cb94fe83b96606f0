"""The product where no kernel of ours takes part."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.linear import linear


@pytest.mark.parametrize("with_bias", [False, True])
def test_into_a_tensor_as_into_a_new_one(with_bias: bool) -> None:
    x, weight, bias = torch.randn(3, 8), torch.randn(5, 8), torch.randn(5) if with_bias else None
    room = torch.full((4, 5), torch.nan)
    written = linear(x, weight, bias, out=room[:3])
    assert written.data_ptr() == room.data_ptr()
    expected = x @ weight.T + (0 if bias is None else bias)
    torch.testing.assert_close(room[:3], expected)
    torch.testing.assert_close(linear(x, weight, bias), expected)
    assert room[3].isnan().all()
