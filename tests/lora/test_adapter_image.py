"""Images hold the whole adapter: A and B put together again from all ranks' pieces are the ones that went in."""

import os
from pathlib import Path

import pytest
import torch

from manylora.lora.adapter_image import write_image
from manylora.lora.page_layout import (
    NUM_MODULES,
    ROW_PARALLEL,
    SLICE_ROWS,
    A,
    AdapterLayout,
    B,
    PoolGeometry,
    Ranks,
    adapter_layout,
)
from manylora.runtime.errors import AdapterLimitError
from tests.lora.adapters import LAYERS, WholeWeights, random_weights, same_ranks, small_geometry, small_model

MIXED = ((4, 0, 16, 24, 0, 64, 8), (0, 1, 0, 0, 17, 0, 33))


def read_piece(
    images: torch.Tensor, geometry: PoolGeometry, layout: AdapterLayout, tp_rank: int, flat: int, which: int
) -> torch.Tensor:
    """One piece as `page_layout` documents its shape."""
    shape, width = geometry.modules[flat % NUM_MODULES], layout.widths[flat]
    size = (width // shape.a_split, shape.in_local) if which == A else (shape.out_local, width)
    start = layout.offsets[flat * 2 + which] // geometry.itemsize
    return images[tp_rank, start : start + size[0] * size[1]].view(size)


def reassemble(
    images: torch.Tensor, geometry: PoolGeometry, layout: AdapterLayout, sharding: str, kv_heads: int
) -> dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]:
    """A and B of every module, rank padding included, from what the table in `page_layout` says each rank holds."""
    slora, tp_size = sharding == "slora", geometry.tp_size
    pieces: dict[tuple[int, int], tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for flat, width in enumerate(layout.widths):
        if width == 0:
            continue
        module, layer = flat % NUM_MODULES, flat // NUM_MODULES % LAYERS
        a = [read_piece(images, geometry, layout, rank, flat, A) for rank in range(tp_size)]
        b = [read_piece(images, geometry, layout, rank, flat, B) for rank in range(tp_size)]
        if module in ROW_PARALLEL:
            whole_a, whole_b = torch.cat(a, 1), torch.cat(b) if slora else same(b)
        else:
            copies = max(1, tp_size // kv_heads) if module in (1, 2) else 1
            groups = [same(b[first : first + copies]) for first in range(0, tp_size, copies)]
            whole_a, whole_b = torch.cat(a) if slora else same(a), torch.cat(groups)
        halves = pieces.setdefault((layer, module), ([], []))
        halves[A].append(whole_a)
        halves[B].append(whole_b)
    return {place: (torch.cat(a), torch.cat(b, 1)) for place, (a, b) in pieces.items()}


def same(copies: list[torch.Tensor]) -> torch.Tensor:
    for copy in copies[1:]:
        assert torch.equal(copy, copies[0])
    return copies[0]


def check_whole(
    weights: WholeWeights, found: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]]
) -> None:
    assert found.keys() == weights.tensors.keys()
    for place, (lora_a, lora_b) in weights.tensors.items():
        rank = len(lora_a)
        found_a, found_b = found[place]
        assert torch.equal(found_a[:rank], lora_a)
        assert torch.equal(found_b[:, :rank], lora_b)
        assert not found_a[rank:].any()
        assert not found_b[:, rank:].any()
        assert len(found_a) < rank + SLICE_ROWS


@pytest.mark.parametrize("sharding", ["slora", "replicated"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize(
    "ranks",
    [
        *(same_ranks(rank) for rank in (1, 4, 8, 16, 24, 64)),
        same_ranks(8, ("q_proj",)),
        same_ranks(20, ("gate_proj", "down_proj")),
        MIXED,
    ],
    ids=["r1", "r4", "r8", "r16", "r24", "r64", "q", "gate-down", "mixed"],
)
def test_round_trip(tmp_path: Path, ranks: Ranks, kv_heads: int, tp_size: int, sharding: str) -> None:
    model = small_model(kv_heads)
    geometry = small_geometry(model, tp_size, sharding)
    weights = random_weights(model, ranks)
    layout = write_image(tmp_path / "image", weights, geometry, torch.float32)
    assert layout == adapter_layout(geometry, ranks)
    data = (tmp_path / "image").read_bytes()
    assert len(data) == tp_size * layout.num_pages * geometry.page_bytes
    images = torch.frombuffer(bytearray(data), dtype=torch.float32).view(tp_size, -1)
    check_whole(weights, reassemble(images, geometry, layout, sharding, kv_heads))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = small_model()
    geometry = small_geometry(model, 2, "slora", itemsize=2)
    weights = random_weights(model, MIXED, dtype=dtype)
    layout = write_image(tmp_path / "image", weights, geometry, dtype)
    images = torch.frombuffer(bytearray((tmp_path / "image").read_bytes()), dtype=dtype).view(2, -1)
    check_whole(weights, reassemble(images, geometry, layout, "slora", 2))


def test_full_shared_memory_is_an_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system writes what still fits, and then says so."""
    whole_write, calls = os.pwrite, 0

    def full(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal calls
        calls += 1
        if calls > 4:
            raise OSError(28, "No space left on device")
        return whole_write(descriptor, data[: len(data) // 2 + 1], offset)

    monkeypatch.setattr("os.pwrite", full)
    model = small_model()
    with pytest.raises(AdapterLimitError, match="no room for the adapter: No space left"):
        write_image(
            tmp_path / "image",
            random_weights(model, same_ranks(4)),
            small_geometry(model, 1, "slora"),
            torch.float32,
        )
    assert calls == 5


def test_what_is_written_in_parts_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model()
    geometry, weights = small_geometry(model, 2, "slora"), random_weights(model, MIXED)
    write_image(tmp_path / "expected", weights, geometry, torch.float32)
    whole_write = os.pwrite
    monkeypatch.setattr("os.pwrite", lambda fd, data, offset: whole_write(fd, data[:100], offset))
    write_image(tmp_path / "image", weights, geometry, torch.float32)
    assert (tmp_path / "image").read_bytes() == (tmp_path / "expected").read_bytes()
