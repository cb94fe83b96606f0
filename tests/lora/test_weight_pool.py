"""The resident side: images into host pages, host pages into scattered pool pages, and a table that finds every piece."""

import select
from pathlib import Path

import pytest
import torch

from manylora.lora.adapter_image import write_image
from manylora.lora.host_arena import HostArena
from manylora.lora.page_layout import ABSENT, NUM_MODULES, SITES, A, AdapterLayout, B, PoolGeometry
from manylora.lora.staging import StagingThread
from manylora.lora.weight_pool import WeightPool
from manylora.runtime.messages import AdapterStaged, DropAdapter, StageAdapter, pack_i32
from tests.lora.adapters import WholeWeights, random_weights, same_ranks, small_geometry, small_model

MODEL = small_model()
NUM_SLICES, NUM_PAGES = 12, 200


def empty_pool(geometry: PoolGeometry, device: str = "cpu") -> WeightPool:
    elements = torch.full(
        (NUM_PAGES * geometry.page_bytes // geometry.itemsize,), float("nan"), device=device
    )
    arena = HostArena(NUM_PAGES, geometry.page_bytes, pinned=device == "cuda")
    return WeightPool(geometry, elements, NUM_SLICES, arena)


class Image:
    """An adapter's file and what the scheduler knows of it."""

    def __init__(self, path: Path, geometry: PoolGeometry, weights: WholeWeights) -> None:
        self.path = str(path)
        self.weights = weights
        self.layout = write_image(path, weights, geometry, torch.float32)

    def command(self, version: int, host_pages: list[int]) -> StageAdapter:
        return StageAdapter(
            version, self.path, self.weights.ranks, self.weights.scalings, pack_i32(host_pages)
        )


def check_pieces(
    pool: WeightPool, image: Image, slices: list[int], tp_rank: int, *, device_table: bool = False
) -> None:
    """Every piece found through the table is the one of the image; what is absent is marked so."""
    geometry, layout = pool.geometry, image.layout
    table = pool.device_table if device_table else pool.table
    data = torch.frombuffer(bytearray(Path(image.path).read_bytes()), dtype=torch.float32)
    mine = data.view(geometry.tp_size, -1)[tp_rank]
    for flat, width in enumerate(layout.widths):
        module, layer = flat % NUM_MODULES, flat // NUM_MODULES % geometry.num_layers
        row = slices[flat // NUM_MODULES // geometry.num_layers]
        assert table.widths[row, layer, module] == width
        if width:
            scaling = image.weights.scalings[layer][module]
            assert float(table.scalings[row, layer, module]) == pytest.approx(scaling)
        for which in (A, B):
            start = int(table.offsets[row, layer, module, which])
            if width == 0:
                assert start == ABSENT
                continue
            size = geometry.piece_bytes(module, which, width) // geometry.itemsize
            source = layout.offsets[flat * 2 + which] // geometry.itemsize
            assert torch.equal(pool.elements[start : start + size].cpu(), mine[source : source + size])


def pages_of(layout: AdapterLayout, first: int, step: int) -> list[int]:
    """Scattered and falling, as pages come from a free list."""
    return [first + step * index for index in reversed(range(layout.num_pages))]


@pytest.mark.parametrize(("tp_size", "tp_rank"), [(1, 0), (2, 1), (4, 2)])
def test_copies_of_two_adapters(tmp_path: Path, tp_size: int, tp_rank: int) -> None:
    geometry = small_geometry(MODEL, tp_size, "slora")
    pool = empty_pool(geometry)
    big = Image(tmp_path / "big", geometry, random_weights(MODEL, same_ranks(40), seed=1))
    small = Image(tmp_path / "small", geometry, random_weights(MODEL, same_ranks(4, ("k_proj",)), seed=2))
    slices = {1: [7, 0, 3], 2: [5]}
    for version, image, first in ((1, big, 0), (2, small, 1)):
        host_pages = pages_of(image.layout, first, 2)
        pool.stage(version, image.path, image.weights.ranks, image.weights.scalings, host_pages, tp_rank)
        pool.copy(version, pages_of(image.layout, 2 + first, 2), slices[version])
    assert pool.done() == [1, 2]
    assert pool.done() == []
    check_pieces(pool, big, slices[1], tp_rank)
    check_pieces(pool, small, slices[2], tp_rank)


def test_nothing_but_the_given_pages_is_written(tmp_path: Path) -> None:
    geometry = small_geometry(MODEL, 1, "slora")
    pool = empty_pool(geometry)
    image = Image(tmp_path / "image", geometry, random_weights(MODEL, same_ranks(8)))
    host_pages, pages = pages_of(image.layout, 0, 1), pages_of(image.layout, 10, 3)
    pool.stage(1, image.path, image.weights.ranks, image.weights.scalings, host_pages, 0)
    pool.copy(1, pages, [4])
    touched = ~pool.elements.view(NUM_PAGES, -1).isnan().all(1)
    assert touched.nonzero().flatten().tolist() == sorted(pages)
    assert [row for row in range(NUM_SLICES) if pool.table.widths[row].any()] == [4]


def test_a_resident_adapter_outlives_its_host_copy(tmp_path: Path) -> None:
    geometry = small_geometry(MODEL, 1, "slora")
    pool = empty_pool(geometry)
    image = Image(tmp_path / "image", geometry, random_weights(MODEL, same_ranks(8), seed=1))
    other = Image(tmp_path / "other", geometry, random_weights(MODEL, same_ranks(8), seed=2))
    host_pages = pages_of(image.layout, 0, 1)
    for version, staged in ((1, image), (2, other)):
        pool.stage(version, staged.path, staged.weights.ranks, staged.weights.scalings, host_pages, 0)
        if version == 1:
            pool.copy(1, pages_of(image.layout, 0, 1), [0])
            pool.forget(1)
    check_pieces(pool, image, [0], 0)


def test_a_slice_row_is_written_whole(tmp_path: Path) -> None:
    """A row's next tenant lacks modules that the last one had: nothing of it is left over."""
    geometry = small_geometry(MODEL, 1, "slora")
    pool = empty_pool(geometry)
    full = Image(tmp_path / "full", geometry, random_weights(MODEL, same_ranks(16), seed=1))
    part = Image(tmp_path / "part", geometry, random_weights(MODEL, same_ranks(8, ("o_proj",)), seed=2))
    for version, image in ((1, full), (2, part)):
        host_pages = pages_of(image.layout, 0, 1)
        pool.stage(version, image.path, image.weights.ranks, image.weights.scalings, host_pages, 0)
        pool.copy(version, pages_of(image.layout, 0, 1), [6])
    check_pieces(pool, part, [6], 0)


def test_site_tables_are_views() -> None:
    pool = empty_pool(small_geometry(MODEL, 1, "slora"))
    table = pool.table.site(1, 2)
    assert table.widths.shape == (NUM_SLICES, len(SITES[2]))
    pool.table.widths[3, 1, SITES[2][1]] = 8
    pool.table.offsets[3, 1, SITES[2][1], B] = 64
    assert table.widths[3].tolist() == [0, 8]
    assert table.b_offsets[3].tolist() == [ABSENT, 64]
    assert table.a_offsets[3].tolist() == [ABSENT, ABSENT]


def wait_for(thread: StagingThread, count: int) -> list[AdapterStaged]:
    answers: list[AdapterStaged] = []
    while len(answers) < count:
        assert select.select([thread.fileno()], [], [], 10)[0], "the staging thread does not answer"
        answers += thread.drain()
    return answers


def test_staging_thread(tmp_path: Path) -> None:
    geometry = small_geometry(MODEL, 2, "slora")
    pool = empty_pool(geometry)
    thread = StagingThread(pool, tp_rank=1)
    image = Image(tmp_path / "image", geometry, random_weights(MODEL, same_ranks(24)))
    host_pages = pages_of(image.layout, 3, 1)
    try:
        thread.submit(image.command(1, host_pages))
        assert wait_for(thread, 1) == [AdapterStaged(1, 1)]
        assert not select.select([thread.fileno()], [], [], 0)[0]
        pool.copy(1, pages_of(image.layout, 0, 1), [2, 1])
        check_pieces(pool, image, [2, 1], 1)

        Path(image.path).write_bytes(b"short")
        thread.submit(image.command(2, host_pages))
        Path(image.path).unlink(missing_ok=True)
        thread.submit(image.command(3, host_pages))
        thread.submit(DropAdapter(1))
        errors = {answer.version: answer.error for answer in wait_for(thread, 2)}
        assert all(error and "rank 1 could not stage" in error.message for error in errors.values())
        assert sorted(errors) == [2, 3]
    finally:
        thread.close()
    with pytest.raises(KeyError):
        pool.copy(1, [], [])


@pytest.mark.gpu
def test_copies_on_a_gpu(tmp_path: Path) -> None:
    geometry = small_geometry(MODEL, 1, "slora")
    pool = empty_pool(geometry, device="cuda")
    image = Image(tmp_path / "image", geometry, random_weights(MODEL, same_ranks(24)))
    host_pages = pages_of(image.layout, 0, 1)
    pool.stage(1, image.path, image.weights.ranks, image.weights.scalings, host_pages, 0)
    pool.copy(1, pages_of(image.layout, 5, 2), [3, 9])
    assert pool.copying
    torch.cuda.synchronize()
    assert pool.done() == [1]
    check_pieces(pool, image, [3, 9], 0)
    check_pieces(pool, image, [3, 9], 0, device_table=True)
