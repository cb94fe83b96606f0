"""How adapters tile into pages: no overlap, nothing outside a page, the same on every rank, little waste."""

from itertools import pairwise

import msgspec
import pytest

from manylora.lora.page_layout import (
    ABSENT,
    MODULES,
    NUM_MODULES,
    SITES,
    A,
    AdapterLayout,
    B,
    PoolGeometry,
    Q,
    adapter_layout,
    module_sizes,
    pool_geometry,
)
from manylora.runtime.model_config import ModelConfig
from tests.lora.adapters import small_model


def make_model(hidden: int = 4096, layers: int = 32, kv_heads: int = 8) -> ModelConfig:
    """With heads of 128, and the proportions of an 8B model."""
    return msgspec.structs.replace(
        small_model(kv_heads),
        hidden_size=hidden,
        intermediate_size=hidden * 7 // 2,
        num_layers=layers,
        num_heads=hidden // 128,
        head_dim=128,
    )


def pieces(geometry: PoolGeometry, layout: AdapterLayout) -> list[tuple[int, int]]:
    """(offset, bytes) of every piece present."""
    found = []
    for flat, offset in enumerate(layout.offsets):
        width = layout.widths[flat // 2]
        assert (offset == ABSENT) == (width == 0)
        if offset != ABSENT:
            found.append((offset, geometry.piece_bytes(flat // 2 % NUM_MODULES, flat % 2, width)))
    return found


@pytest.mark.parametrize("sharding", ["slora", "replicated"])
@pytest.mark.parametrize("tp_size", [1, 2, 4, 16])
@pytest.mark.parametrize("rank", [1, 8, 16, 24, 64])
def test_pieces_neither_overlap_nor_cross_a_page(sharding: str, tp_size: int, rank: int) -> None:
    geometry = pool_geometry(
        make_model(layers=4), tp_size=tp_size, sharding=sharding, page_size=16, itemsize=2
    )
    layout = adapter_layout(geometry, [[rank] * NUM_MODULES] * 4)
    spans = sorted(pieces(geometry, layout))
    assert len(spans) == -(-rank // 16) * 4 * NUM_MODULES * 2
    for (offset, size), (following, _) in pairwise(spans):
        assert offset + size <= following
    for offset, size in spans:
        assert offset // geometry.page_bytes == (offset + size - 1) // geometry.page_bytes
        assert offset % 64 == 0
    assert spans[-1][0] < layout.num_pages * geometry.page_bytes


def test_what_an_adapter_lacks_takes_nothing() -> None:
    geometry = pool_geometry(make_model(layers=2), tp_size=1, sharding="slora", page_size=16, itemsize=2)
    only_q = [[8 if module == Q else 0 for module in range(NUM_MODULES)]] * 2
    layout = adapter_layout(geometry, only_q)
    assert sum(offset != ABSENT for offset in layout.offsets) == 4  # A and B of q in two layers
    assert layout.num_slices == 1
    assert adapter_layout(geometry, [[0] * NUM_MODULES] * 2).num_pages == 0


def test_ranks_may_differ_by_layer_and_module() -> None:
    geometry = pool_geometry(make_model(layers=2), tp_size=2, sharding="slora", page_size=16, itemsize=2)
    layout = adapter_layout(geometry, [[40, 8, 0, 16, 1, 0, 17], [0, 0, 0, 0, 0, 0, 0]])
    widths = [layout.widths[s * 2 * NUM_MODULES : (s * 2 + 1) * NUM_MODULES] for s in range(3)]
    assert widths == [(16, 8, 0, 16, 8, 0, 16), (16, 0, 0, 0, 0, 0, 8), (8, 0, 0, 0, 0, 0, 0)]


def test_the_pieces_of_a_site_lie_together_where_a_page_can_hold_them() -> None:
    geometry = pool_geometry(make_model(), tp_size=1, sharding="slora", page_size=16, itemsize=2)
    layout = adapter_layout(geometry, [[16] * NUM_MODULES] * 32)
    for layer in range(32):
        for site in SITES:
            flats = [(layer * NUM_MODULES + module) * 2 + which for which in (A, B) for module in site]
            offsets = [layout.offsets[flat] for flat in flats]
            for flat, (offset, following) in zip(flats, pairwise(offsets), strict=False):
                assert following == offset + geometry.piece_bytes(flat // 2 % NUM_MODULES, flat % 2, 16)


@pytest.mark.parametrize(
    ("tp_size", "sharding", "bound"), [(1, "slora", 1.08), (4, "slora", 1.08), (2, "replicated", 1.2)]
)
@pytest.mark.parametrize("rank", [4, 16, 64])
def test_packing_wastes_little(tp_size: int, sharding: str, bound: float, rank: int) -> None:
    geometry = pool_geometry(make_model(), tp_size=tp_size, sharding=sharding, page_size=16, itemsize=2)
    layout = adapter_layout(geometry, [[rank] * NUM_MODULES] * 32)
    used = sum(size for _, size in pieces(geometry, layout))
    assert used == layout.num_bytes
    assert layout.num_pages * geometry.page_bytes <= bound * used


def test_a_page_holds_the_largest_piece_of_a_shallow_model() -> None:
    geometry = pool_geometry(
        make_model(layers=1, kv_heads=1), tp_size=1, sharding="slora", page_size=16, itemsize=4
    )
    assert geometry.page_bytes == 16 * 4096 * 7 // 2 * 4 > geometry.kv_bytes


def test_slora_keeps_one_nth_of_an_adapter() -> None:
    model, ranks = make_model(), [[16] * NUM_MODULES] * 32
    sizes = []
    for tp_size in (1, 2, 4, 8):
        geometry = pool_geometry(model, tp_size=tp_size, sharding="slora", page_size=16, itemsize=2)
        sizes.append(sum(size for _, size in pieces(geometry, adapter_layout(geometry, ranks))))
    assert sizes == [sizes[0] // n for n in (1, 2, 4, 8)]


def test_module_sizes_are_the_files_shapes() -> None:
    sizes = dict(zip(MODULES, module_sizes(make_model()), strict=True))
    assert sizes["k_proj"] == (4096, 1024)
    assert sizes["down_proj"] == (14336, 4096)
