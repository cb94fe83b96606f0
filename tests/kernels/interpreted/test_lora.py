"""The LoRA kernels and their work list under the interpreter, against the reference ops on the host."""

from __future__ import annotations

import pytest
import torch

from manylora.kernels.lora_work import DECODE_TILE, PREFILL_TILE, LoRAWork
from manylora.kernels.lora_work_triton import list_work
from tests.kernels.lora_cases import NAN, PATTERNS, RANKS, Site, popular_runs

torch.set_num_threads(1)
TOLERANCE = {torch.float32: (1e-5, 1e-5), torch.float16: (2e-3, 2e-3)}


def check(
    site: Site, runs: list[tuple[int, int | None]], dtype: torch.dtype, *, padding: int = 0, parts: int = 1
) -> None:
    num_tokens = sum(count for count, _ in runs)
    generator = torch.Generator().manual_seed(4)
    # x and y are parts of wider tensors whose other columns no kernel may use.
    wide_x = torch.full((num_tokens, site.features + 8), NAN, dtype=dtype)
    wide_x[:, : site.features] = torch.randn(num_tokens, site.features, generator=generator)
    x = wide_x[:, : site.features]
    columns = sum(site.out_sizes)
    wide_y = torch.randn(num_tokens, columns + 8, generator=generator).to(dtype)
    before, y = wide_y.clone(), wide_y[:, :columns]
    expected = site.expected(runs, x, y)
    work = site.work(runs, padding, room=padding)
    rtol, atol = TOLERANCE[dtype]
    if work.decode and parts == 1:
        addend = site.addend(work, x)
        assert addend.values.isnan().all(1).eq(work.has_adapter == 0).all()
        torch.testing.assert_close(addend.added_to(y).to(dtype), expected, rtol=rtol, atol=atol)
    site.apply(work, x, y, parts)
    torch.testing.assert_close(y, expected, rtol=rtol, atol=atol)
    assert torch.equal(wide_y[:, columns:], before[:, columns:])
    first = 0
    for count, adapter in runs:
        if adapter is None:
            assert torch.equal(y[first : first + count], before[first : first + count, :columns])
        first += count


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decode_steps(pattern: str, dtype: torch.dtype) -> None:
    site = Site(72, (40, 16, 24), RANKS, dtype, absent=[(0, 0), (2, 1), (3, 0), (3, 2)])
    check(site, popular_runs(pattern, 27, len(RANKS)), dtype)


@pytest.mark.parametrize("runs", [[(1, 0)], [(3, None)], [(2, None), (1, 2), (17, 1), (1, None)]], ids=str)
def test_small_steps_with_padding_as_in_a_graph(runs: list[tuple[int, int | None]]) -> None:
    check(Site(20, (130,), (16, 5, 64), torch.float32), runs, torch.float32, padding=3)


def test_runs_of_blocks() -> None:
    """Modules of several units, the last of them short, for adapters of one, a few and many slices."""
    site = Site(24, (1300, 264), (16, 5, 80, 24), torch.float32, absent=[(1, 0), (3, 1)])
    check(site, [(1, 0), (1, 1), (1, 2), (1, 3), (2, 0), (9, 1), (2, None), (3, 2), (2, 3)], torch.float32)


@pytest.mark.parametrize("rank", [16, 24, 80])
def test_an_adapter_without_a_module_leaves_its_bits(rank: int) -> None:
    site = Site(16, (16, 8), (rank,), torch.float32, absent=[(0, 0)])
    y = torch.full((2, 24), -0.0)
    site.apply(site.work([(1, 0), (1, None)]), torch.ones(2, 16), y)
    assert y[:, :16].signbit().all()
    assert y[0, 16:].all()
    assert y[1].signbit().all()


def test_a_prefill_step_with_decode_rows() -> None:
    runs = [(150, 1), (70, None), (64, 3), (1, 0), (2, 1), (1, None), (1, 2)]
    site = Site(160, (24, 136), (16, 8, 40, 24), torch.float32, absent=[(1, 1)])
    check(site, runs, torch.float32)


@pytest.mark.parametrize("counts", [[(150, 1), (99, None), (64, 3)], [(9, 2), (4, None), (11, 0)]], ids=str)
def test_one_token_of_each_row_in_the_planes_of_all(counts: list[tuple[int, int | None]]) -> None:
    """A step of some prompts, each with its adapter, then their last tokens alone: what the first left is not read."""
    site = Site(160, (24, 136), RANKS, torch.float32, absent=[(1, 1)])
    whole, rows = site.work(counts), [(1, adapter) for _, adapter in counts]
    segments, slices, _ = site.step(rows)
    assert slices.tolist() == whole.slices.tolist()
    work = whole.resized(segments.long(), len(rows))
    list_work(work)
    whole.planes(site.features, 32).fill_(NAN)
    assert work.planes(160, 32).data_ptr() == whole.planes(160, 32).data_ptr()
    x, y = torch.randn(len(rows), 160), torch.randn(len(rows), 160)
    expected = site.expected(rows, x, y)
    site.apply(work, x, y)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_planes_gathered_from_ranks(parts: int) -> None:
    site = Site(48, (32, 16), (16, 8, 40), torch.float32, absent=[(2, 0)])
    check(site, [(3, 0), (1, None), (2, 1), (20, 2)], torch.float32, parts=parts)


def test_an_adapter_without_the_site_leaves_y_unread() -> None:
    site = Site(16, (16,), (16, 16), torch.float32, absent=[(0, 0)])
    y = torch.full((2, 16), NAN)
    y[1] = 1.0
    site.apply(site.work([(1, 0), (1, 1)]), torch.ones(2, 16), y)
    assert y[0].isnan().all()
    assert y[1].isfinite().all()


@pytest.mark.parametrize("num_tokens", [1, 16, 17, 200, 256, 257, 400])
def test_the_work_list(num_tokens: int) -> None:
    """More segments than a block of the kernel holds, against the definition."""
    tile_tokens = DECODE_TILE if num_tokens <= 256 else PREFILL_TILE
    generator = torch.Generator().manual_seed(num_tokens)
    segments, slices, first = [], [], 0
    while first < num_tokens:
        size = min(
            num_tokens - first, int(torch.randint(1, 40 if num_tokens == 400 else 3, (), generator=generator))
        )
        count = int(torch.randint(1, 4, (), generator=generator))
        if len(segments) % 5 != 3:
            segments.append((first, first + size, len(slices), count))
            slices += torch.randint(0, 99, (count,), generator=generator).tolist()
        else:
            segments.append((0, 0, 0, 0))
        first += size
    tiles, items = [], []
    for start, end, entry, count in segments:
        for token in range(start, end, tile_tokens):
            tokens = min(tile_tokens, end - token)
            tiles.append([token, tokens, entry, count, slices[entry]])
            items += [[token, tokens, slices[entry + p], p] for p in range(count)]
    work = LoRAWork(torch.tensor(segments), torch.tensor(slices), 3, num_tokens, 16)
    work.tiles.fill_(-1)
    work.items.fill_(-1)
    work.has_adapter.fill_(-1)
    list_work(work)
    if work.decode:
        held = {token for start, end, _, _ in segments for token in range(start, end)}
        assert work.has_adapter.tolist() == [int(token in held) for token in range(num_tokens)]
    assert work.num_tiles.tolist() == [len(tiles)]
    assert len(tiles) <= work.max_tiles
    assert len(items) <= work.max_items
    assert work.tiles[: len(tiles), :5].tolist() == tiles
    assert work.items[: len(items)].tolist() == items
    assert not work.tiles[len(tiles) :, 1].any()
    assert not work.items[len(items) :, 1].any()


def test_the_list_reaches_past_a_block_of_segments() -> None:
    segments = torch.tensor([[i, i + 1, i, 1] for i in range(300)])
    work = LoRAWork(segments, torch.arange(300) + 7, 1, 300, 16)
    list_work(work)
    assert work.items.tolist() == [[i, 1, i + 7, 0] for i in range(300)]


@pytest.mark.parametrize("num_tokens", [1, 3, 8, 64, 256, 257, 2048, 8192])
def test_planes_fit_their_buffer(num_tokens: int) -> None:
    work = LoRAWork(
        torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), 2, num_tokens, 48
    )
    chunks = [work.planes(features, 48).shape[0] for features in (1, 64, 512, 4096, 14336)]
    assert chunks == sorted(chunks)
    assert chunks[0] == 1
