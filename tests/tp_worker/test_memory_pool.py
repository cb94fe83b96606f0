"""The page pool: where KV lies in a page, whole-page copies, and how large a pool gets."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from manylora.lora.page_layout import PoolGeometry, pool_geometry
from manylora.runtime.config import CacheArgs, LoRAArgs, ModelArgs, ParallelArgs, ScheduleArgs, ServerConfig
from manylora.runtime.errors import OutOfMemoryError
from manylora.tp_worker import memory_pool
from manylora.tp_worker.memory_pool import GIB, PagePool, num_host_pages_that_fit, num_pages_that_fit
from manylora.tp_worker.piecewise_graph import LARGEST_BUCKET
from tests.lora.adapters import small_model

MODEL = msgspec.structs.replace(
    small_model(),
    vocab_size=1000,
    hidden_size=64,
    intermediate_size=512,
    head_dim=16,
    max_position_embeddings=4096,
)
CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)
CONFIG = ServerConfig(model=ModelArgs(model_path="m"))


def geometry(page_size: int = 4, tp_size: int = 1) -> PoolGeometry:
    return pool_geometry(MODEL, tp_size=tp_size, sharding="slora", page_size=page_size, itemsize=4)


def test_kv_lies_at_the_start_of_each_page_and_aliases_the_elements() -> None:
    shape = geometry()
    assert shape.page_bytes > shape.kv_bytes  # else the stride below proves nothing
    pool = PagePool(shape, 3, torch.float32, CPU)
    pool.elements.copy_(torch.arange(len(pool.elements)))
    kv = pool.kv_view()
    assert kv.shape == (4, 2, 2, 2, 4, 16)  # the dummy page is the last
    per_page = shape.page_bytes // 4
    assert kv[1].flatten().tolist() == list(range(per_page, per_page + shape.kv_bytes // 4))
    kv[2, 1, 1, 1, 3, 15] = -5
    assert pool.elements[2 * per_page + shape.kv_bytes // 4 - 1] == -5


def test_a_geometry_of_another_element_size_is_a_bug() -> None:
    with pytest.raises(ValueError, match="4-byte"):
        PagePool(geometry(), 3, torch.bfloat16, CPU)


def test_copy_pages_moves_kv_and_only_kv() -> None:
    pool = PagePool(geometry(), 4, torch.float32, CPU)
    pool.elements.copy_(torch.arange(len(pool.elements)))
    before = pool.elements.clone().view(5, -1)
    pool.copy_pages(torch.tensor([[0, 3], [2, 1]]))
    after = pool.elements.view(5, -1)
    kv = geometry().kv_bytes // 4
    assert torch.equal(after[3, :kv], before[0, :kv])
    assert torch.equal(after[1, :kv], before[2, :kv])
    assert torch.equal(after[:, kv:], before[:, kv:])
    assert torch.equal(after[[0, 2]], before[[0, 2]])


def _with(**parts: msgspec.Struct) -> ServerConfig:
    return msgspec.structs.replace(CONFIG, **parts)


def test_a_cpu_pool_is_shared_by_the_ranks() -> None:
    alone = num_pages_that_fit(CONFIG, MODEL, geometry(), CPU)
    assert alone == GIB // geometry().page_bytes
    halves = _with(parallel=ParallelArgs(tp_size=2))
    shape = geometry(tp_size=2)
    assert num_pages_that_fit(halves, MODEL, shape, CPU) == GIB // 2 // shape.page_bytes


def test_a_cpu_pool_holds_no_more_than_was_asked_for() -> None:
    cache = CacheArgs(page_size=4, max_total_tokens=10_000)
    assert num_pages_that_fit(_with(cache=cache), MODEL, geometry(), CPU) == 2500
    lora = LoRAArgs(enable_lora=True, max_loras_per_batch=2)
    with_room = num_pages_that_fit(_with(cache=cache, lora=lora), MODEL, geometry(), CPU)
    assert 2500 < with_room < GIB // geometry().page_bytes


def test_a_cpu_pool_always_holds_a_useful_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_pool, "CPU_POOL_BYTES", 1)
    assert num_pages_that_fit(CONFIG, MODEL, geometry(), CPU) == 2048 // 4
    short = _with(model=ModelArgs(model_path="m", context_length=100))
    assert num_pages_that_fit(short, MODEL, geometry(), CPU) == 25


def _gpu_with(monkeypatch: pytest.MonkeyPatch, free: int, total: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, total))


def test_a_gpu_pool_is_its_fraction_less_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_with(monkeypatch, free=60 * GIB, total=80 * GIB)
    config = _with(cache=CacheArgs(mem_fraction_static=0.75))
    assert num_pages_that_fit(config, MODEL, geometry(), CUDA) == 40 * GIB // geometry().page_bytes


def test_a_gpu_pool_leaves_room_for_a_step_whatever_the_fraction(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_with(monkeypatch, free=60 * GIB, total=80 * GIB)
    config = _with(cache=CacheArgs(mem_fraction_static=1.0))
    room = memory_pool.workspace_bytes(config, MODEL, itemsize=4)
    assert room > 0
    expected = (60 * GIB - room) // geometry().page_bytes
    assert num_pages_that_fit(config, MODEL, geometry(), CUDA) == expected


@pytest.mark.parametrize(
    ("max_bs", "lora", "tp_size", "itemsize"),
    [(0, True, 1, 4), (1, False, 1, 4), (6, True, 1, 2), (6, True, 2, 4)],
)
def test_what_graphs_share_has_room(max_bs: int, lora: bool, tp_size: int, itemsize: int) -> None:
    config = _with(
        schedule=ScheduleArgs(cuda_graph_max_bs=max_bs),
        lora=LoRAArgs(enable_lora=lora),
        parallel=ParallelArgs(tp_size=tp_size),
    )
    tokens = config.schedule.chunked_prefill_size + (LARGEST_BUCKET if max_bs and tp_size == 1 else 0)
    without = _with(
        schedule=ScheduleArgs(cuda_graph_max_bs=0, chunked_prefill_size=tokens),
        parallel=ParallelArgs(tp_size=tp_size),
    )
    room, bare = (memory_pool.workspace_bytes(each, MODEL, itemsize) for each in (config, without))
    assert room - bare == max_bs * MODEL.vocab_size * itemsize


def test_a_gpu_without_room_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _gpu_with(monkeypatch, free=5 * GIB, total=80 * GIB)
    with pytest.raises(OutOfMemoryError, match="--mem-fraction-static"):
        num_pages_that_fit(_with(cache=CacheArgs(mem_fraction_static=0.9)), MODEL, geometry(), CUDA)


def test_host_pages_are_a_share_of_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_pool, "available_host_bytes", lambda: 64 * GIB)
    config = _with(lora=LoRAArgs(enable_lora=True), parallel=ParallelArgs(tp_size=2))
    assert num_host_pages_that_fit(config, geometry()) == 8 * GIB // geometry().page_bytes
    assert num_host_pages_that_fit(CONFIG, geometry()) == 0


def test_available_memory_is_what_the_kernel_reports() -> None:
    with Path("/proc/meminfo").open() as file:
        total = int(next(line for line in file if line.startswith("MemTotal")).split()[1]) * 1024
    assert 0 < memory_pool.available_host_bytes() <= total


def test_a_control_group_bounds_available_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, used = tmp_path / "memory.max", tmp_path / "memory.current"
    monkeypatch.setattr(memory_pool, "_CGROUP_V2_FILES", (limit, used))
    monkeypatch.setattr(memory_pool, "_CGROUP_V1_FILES", (tmp_path / "none", tmp_path / "none"))
    used.write_text("7000\n")
    (tmp_path / "memory.stat").write_text("anon 5000\ninactive_file 1500\n")
    limit.write_text("10000\n")
    assert memory_pool.available_host_bytes() == 10000 - 7000 + 1500
    limit.write_text("max\n")
    assert memory_pool.available_host_bytes() > 1 << 20
