"""The delta of every site on every rank, put together, is scaling · B·A·x; the ranks are threads in lockstep."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from manylora.lora.adapter_image import write_image
from manylora.lora.delta import LoRADelta, attach_deltas
from manylora.lora.host_arena import HostArena
from manylora.lora.lora_batch import LoRABatch
from manylora.lora.page_layout import MODULES, NUM_MODULES, ROW_PARALLEL, SITES, PoolGeometry, module_sizes
from manylora.lora.weight_pool import WeightPool
from manylora.runtime.model_config import ModelConfig
from tests.lora.adapters import (
    LAYERS,
    LockstepGroup,
    WholeWeights,
    add_delta,
    random_weights,
    run_ranks,
    same_ranks,
    small_geometry,
    small_model,
)

NUM_PAGES, NUM_SLICES = 400, 24
DEVICES = ("cpu", "cuda")
ALL_RANKS = {
    "r1": same_ranks(1),
    "r4": same_ranks(4, ("q_proj", "v_proj")),
    "r8": same_ranks(8, ("q_proj",)),
    "r16": same_ranks(16),
    "r24": same_ranks(24, ("gate_proj", "down_proj", "k_proj")),
    "r64": same_ranks(64),
    "mixed": ((4, 0, 16, 24, 0, 64, 8), (0, 1, 0, 0, 17, 0, 33)),
}
# (tokens, adapter) runs; None: the base model.
RUNS = [
    (1, "r64"),
    (2, None),
    (3, "mixed"),
    (1, "r4"),
    (1, "r8"),
    (2, "r24"),
    (1, "r1"),
    (4, "r16"),
    (1, None),
]
NUM_TOKENS = sum(count for count, _ in RUNS)


@pytest.fixture
def uninitialized_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # torch.empty then fills with NaN
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


class Batch:
    """All adapters, where they lie (the same pages on every rank), and a step that uses them."""

    def __init__(self, tmp_path: Path, model: ModelConfig, geometry: PoolGeometry) -> None:
        self.geometry = geometry
        self.paths = tmp_path
        self.weights = {
            name: random_weights(model, ranks, seed) for seed, (name, ranks) in enumerate(ALL_RANKS.items())
        }
        self.slices: dict[str, list[int]] = {}
        self.pages: dict[str, list[int]] = {}
        generator = torch.Generator().manual_seed(0)
        free_pages = torch.randperm(NUM_PAGES, generator=generator).tolist()
        free_slices = torch.randperm(NUM_SLICES, generator=generator).tolist()
        for name, weights in self.weights.items():
            layout = write_image(tmp_path / name, weights, geometry, torch.float32)
            self.pages[name] = [free_pages.pop() for _ in range(layout.num_pages)]
            self.slices[name] = [free_slices.pop() for _ in range(layout.num_slices)]

    def pool(self, tp_rank: int, device: str = "cpu") -> WeightPool:
        page_elements = self.geometry.page_bytes // self.geometry.itemsize
        elements = torch.full((NUM_PAGES * page_elements,), float("nan"), device=device)
        arena = HostArena(NUM_PAGES, self.geometry.page_bytes, pinned=device == "cuda")
        pool = WeightPool(self.geometry, elements, NUM_SLICES, arena)
        for version, (name, weights) in enumerate(self.weights.items()):
            host_pages = range(len(self.pages[name]))
            path = str(self.paths / name)
            pool.stage(version, path, weights.ranks, weights.scalings, host_pages, tp_rank)
            pool.copy(version, self.pages[name], self.slices[name])
        return pool

    def lora_batch(self) -> LoRABatch:
        segments: list[tuple[int, int, int, int]] = []
        slices: list[int] = []
        first = 0
        for count, name in RUNS:
            if name is not None:
                mine = self.slices[name]
                segments.append((first, first + count, len(slices), len(mine)))
                slices += mine
            first += count
        return LoRABatch(
            torch.tensor(segments, dtype=torch.int32),
            torch.tensor(slices, dtype=torch.int32),
            max(segment[3] for segment in segments),
        )


def dense(
    weights: dict[str, WholeWeights], layer: int, module: int, x: torch.Tensor, out: int
) -> torch.Tensor:
    """scaling · B·A·x of every token's adapter, (T, out)."""
    delta = torch.zeros(len(x), out)
    first = 0
    for count, name in RUNS:
        if name is not None and (layer, module) in weights[name].tensors:
            lora_a, lora_b = weights[name].tensors[layer, module]
            rows = slice(first, first + count)
            delta[rows] = weights[name].scalings[layer][module] * (x[rows] @ lora_a.T @ lora_b.T)
        first += count
    return delta


def columns(whole: torch.Tensor, size: int, tp_size: int, tp_rank: int) -> torch.Tensor:
    """A rank's columns; ranks share them where there are fewer parts than ranks."""
    parts = whole.shape[1] // size
    return whole[:, tp_rank * parts // tp_size * size :][:, :size]


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("sharding", ["slora", "replicated"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
def test_deltas_of_all_ranks_together(tmp_path: Path, tp_size: int, sharding: str, kv_heads: int) -> None:
    model = small_model(kv_heads)
    geometry = small_geometry(model, tp_size, sharding)
    batch = Batch(tmp_path, model, geometry)
    lora_batch = batch.lora_batch()
    sizes = module_sizes(model)
    places = [(layer, site) for layer in range(LAYERS) for site in range(len(SITES))]
    inputs = {(layer, site): torch.randn(NUM_TOKENS, sizes[SITES[site][0]][0]) for layer, site in places}

    def run(group: LockstepGroup) -> tuple[dict[tuple[int, int], torch.Tensor], list[str]]:
        pool = batch.pool(group.rank)
        results: dict[tuple[int, int], torch.Tensor] = {}
        for layer, site in places:
            first = SITES[site][0]
            shapes = [geometry.modules[module] for module in SITES[site]]
            width = sizes[first][1] if first in ROW_PARALLEL else sum(shape.out_local for shape in shapes)
            x = inputs[layer, site]
            if first in ROW_PARALLEL:
                x = columns(x, shapes[0].in_local, tp_size, group.rank)
            y = torch.ones(NUM_TOKENS, width)
            add_delta(LoRADelta(pool, layer, site, group, sharding), x, y, lora_batch)
            results[layer, site] = y - 1
        return results, group.collectives

    ranks = run_ranks(tp_size, run)
    for layer, site in places:
        expected = [
            dense(batch.weights, layer, module, inputs[layer, site], sizes[module][1])
            for module in SITES[site]
        ]
        if SITES[site][0] in ROW_PARALLEL:
            total = sum(result[layer, site] for result, _ in ranks)
            torch.testing.assert_close(total, expected[0], rtol=1e-5, atol=1e-5)
            continue
        for tp_rank, (result, _) in enumerate(ranks):
            mine = [
                columns(delta, geometry.modules[module].out_local, tp_size, tp_rank)
                for module, delta in zip(SITES[site], expected, strict=True)
            ]
            torch.testing.assert_close(result[layer, site], torch.cat(mine, 1), rtol=1e-5, atol=1e-5)
    sharded = sharding == "slora" and tp_size > 1
    per_layer = ["all_gather", "all_reduce", "all_gather", "all_reduce"] if sharded else []
    assert all(collectives == per_layer * LAYERS for _, collectives in ranks)


@pytest.mark.usefixtures("uninitialized_memory_is_nan")
def test_tokens_without_an_adapter_keep_their_bits(tmp_path: Path) -> None:
    model = small_model()
    batch = Batch(tmp_path, model, small_geometry(model, 1, "slora"))
    y = torch.randn(NUM_TOKENS, 64)
    before = y.clone()

    def run(group: LockstepGroup) -> None:
        delta = LoRADelta(batch.pool(0), 0, 0, group, "slora")
        add_delta(delta, torch.randn(NUM_TOKENS, 32), y, batch.lora_batch())

    run_ranks(1, run)
    first = 0
    for count, name in RUNS:
        same = torch.equal(y[first : first + count], before[first : first + count])
        touches_qkv = name is not None and any(batch.weights[name].ranks[0][:3])
        assert same is not touches_qkv
        first += count


@pytest.mark.gpu
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("site", range(len(SITES)))
def test_on_a_gpu_as_on_a_cpu(tmp_path: Path, site: int, apart: bool) -> None:
    model = small_model()
    geometry = small_geometry(model, 1, "slora")
    batch = Batch(tmp_path, model, geometry)
    shapes = [geometry.modules[module] for module in SITES[site]]
    x = torch.randn(NUM_TOKENS, shapes[0].in_local)
    y = {device: torch.ones(NUM_TOKENS, sum(shape.out_local for shape in shapes)) for device in DEVICES}

    def run(group: LockstepGroup) -> None:
        for device in DEVICES:
            pool = batch.pool(0, device)
            torch.cuda.synchronize()  # the copies
            y[device] = y[device].to(device)
            stream = torch.cuda.Stream() if device == "cuda" else None
            delta = LoRADelta(pool, 0, site, group, "slora", stream)
            step = batch.lora_batch()
            if device == "cuda":
                lists = (step.segments.to(device), step.slices.to(device))
                step = LoRABatch.on_device(*lists, step.max_slices, NUM_TOKENS, geometry, captured=apart)
                step.prepare()
            add_delta(delta, x.to(device), y[device], step)

    run_ranks(1, run)
    torch.testing.assert_close(y["cuda"].cpu(), y["cpu"], rtol=1e-4, atol=1e-4)


def test_attached_to_every_site_of_a_model(tmp_path: Path) -> None:
    class Linear:
        defers = True
        lora: LoRADelta | None = None

    class Model:
        def __init__(self) -> None:
            self.sites = [(layer, site, Linear()) for layer in range(LAYERS) for site in range(len(SITES))]

        def lora_sites(self) -> list[tuple[int, int, Linear]]:
            return self.sites

    assert sum(map(len, SITES)) == NUM_MODULES == len(MODULES)
    model = Model()
    config = small_model()
    pool = Batch(tmp_path, config, small_geometry(config, 1, "slora")).pool(0)
    run_ranks(1, lambda group: attach_deltas(model, pool, group, "slora"))
    assert len({id(linear.lora) for _, _, linear in model.sites}) == LAYERS * len(SITES)
    assert all(isinstance(linear.lora, LoRADelta) for _, _, linear in model.sites)
