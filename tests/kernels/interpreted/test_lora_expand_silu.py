"""The expand of gate and up fused with `silu_and_mul`, under the interpreter: bit for bit what the two kernels give."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.activation_triton import silu_and_mul
from tests.kernels.lora_cases import NAN, PATTERNS, RANKS, Site, popular_runs

torch.set_num_threads(1)
Runs = list[tuple[int, int | None]]
FITTING = [rank for rank in RANKS if rank <= 64]
ABSENT = [(0, 0), (2, 1), (3, 0), (3, 1)]


def check(site: Site, runs: Runs, dtype: torch.dtype, padding: int = 0) -> None:
    num_tokens, size = sum(count for count, _ in runs), site.out_sizes[0]
    generator = torch.Generator().manual_seed(4)
    # Of few bits, so that sums are exact: the host's products of blocks of other sizes take them in another order.
    site.pages.mul_(16).round_().div_(16)
    x = torch.randn(num_tokens, site.features, generator=generator).mul_(4).round_().div_(4).to(dtype)
    # y is a part of a wider tensor whose other columns no kernel may use.
    wide_y = torch.full((num_tokens, 2 * size + 8), NAN, dtype=dtype)
    wide_y[:, : 2 * size] = torch.randn(num_tokens, 2 * size, generator=generator)
    wide_y[:, :: max(1, size - 1)] = -0.0
    y = wide_y[:, : 2 * size]
    before = wide_y.clone()
    work = site.work(runs, padding, room=padding)
    out = site.apply_gated(work, x, y)
    assert torch.equal(wide_y.nan_to_num(), before.nan_to_num())
    site.apply(work, x, y)
    expected = silu_and_mul(y)
    assert torch.equal(out, expected)
    assert torch.equal(out.signbit(), expected.signbit())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_steps(pattern: str, dtype: torch.dtype) -> None:
    site = Site(72, (40, 40), FITTING, dtype, absent=ABSENT)
    check(site, popular_runs(pattern, 27, len(FITTING)), dtype)


@pytest.mark.parametrize(
    "runs", [[(1, 0)], [(3, None)], [(9, None)], [(2, None), (1, 2), (17, 1), (1, None)]], ids=str
)
def test_small_steps_with_padding_as_in_a_graph(runs: Runs) -> None:
    check(Site(20, (130, 130), (16, 5, 8), torch.float32), runs, torch.float32, padding=3)


def test_runs_of_blocks() -> None:
    """Modules of several units, the last of them short, for adapters of one and of several slices."""
    site = Site(24, (1300, 1300), (16, 5, 64, 24), torch.float32, absent=[(1, 0), (3, 1)])
    runs: Runs = [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (9, 1), (2, None), (3, 2), (2, 3)]
    check(site, runs, torch.float32)


def test_more_tiles_than_are_looked_at_together() -> None:
    runs: Runs = [(1, token % 3 if token % 5 else None) for token in range(90)]
    check(Site(16, (24, 24), (16, 8, 24), torch.float32), runs, torch.float32)


def test_what_it_does_not_take() -> None:
    x = torch.ones(1, 16)
    many = Site(16, (8, 8), (80,), torch.float32)
    with pytest.raises(ValueError, match="not 5"):
        many.apply_gated(many.work([(1, 0)]), x, torch.ones(1, 16))
    prompt = Site(16, (8, 8), (16,), torch.float32)
    with pytest.raises(ValueError, match="decode"):
        prompt.apply_gated(prompt.work([(300, 0)]), x.expand(300, -1), torch.ones(300, 16))
