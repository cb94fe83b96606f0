"""The one memory of a worker: a buffer of equal pages that hold KV or adapter weights, and how large it may be.

The scheduler owns the page numbers; this file only knows where a page lies and what it looks like.
"""

from __future__ import annotations

from pathlib import Path

import torch

from manylora.lora.page_layout import NUM_MODULES, PoolGeometry, adapter_layout
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import OutOfMemoryError
from manylora.runtime.model_config import ModelConfig
from manylora.tp_worker.piecewise_graph import LARGEST_BUCKET

GIB = 1 << 30
CPU_POOL_BYTES = GIB  # of all ranks together; touched only as pages are used
USEFUL_TOKENS = 2048  # a pool that cannot hold a sequence this long (or the context, if shorter) is refused
ROOM_RANK = 64  # the adapters a CPU pool bounded by --max-total-tokens has room for

_CGROUP_V2_FILES = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
_CGROUP_V1_FILES = (
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
    Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


class PagePool:
    """`num_pages` pages of `geometry.page_bytes`, uninitialised, and a dummy page behind them for writes nobody reads.

    elements: the whole buffer as one tensor of the model's dtype, where adapter weights are addressed.
    """

    def __init__(
        self, geometry: PoolGeometry, num_pages: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        if dtype.itemsize != geometry.itemsize:
            raise ValueError(f"the geometry is of {geometry.itemsize}-byte elements, {dtype} is not")
        self.geometry = geometry
        self.num_pages = num_pages
        self.dummy_page = num_pages
        size = (num_pages + 1) * geometry.page_bytes // geometry.itemsize
        self.elements = torch.empty(size, dtype=dtype, device=device)
        self._kv = self.elements.view(num_pages + 1, -1)[:, : geometry.kv_bytes // geometry.itemsize]

    def kv_view(self) -> torch.Tensor:
        """Every page seen as KV: (page, layer, 2, kv_head, page_size, head_dim), strided, sharing the buffer."""
        shape = self.geometry
        return self._kv.unflatten(1, (shape.num_layers, 2, shape.kv_heads, shape.page_size, shape.head_dim))

    def copy_pages(self, copies: torch.Tensor) -> None:
        """Copy the KV of whole pages. copies: (n, 2) int64, source and target page; targets are distinct."""
        self._kv.index_copy_(0, copies[:, 1], self._kv.index_select(0, copies[:, 0]))


def num_pages_that_fit(
    config: ServerConfig, model: ModelConfig, geometry: PoolGeometry, device: torch.device
) -> int:
    """How many pages this rank's pool gets. Call it when everything else lies on the device.

    CUDA: `--mem-fraction-static` of the device, minus what is in use, minus the part of a step's workspace that the
    rest of the device does not hold. CPU: a fixed share, less if `--max-total-tokens` needs less. Raises
    OutOfMemoryError if one useful sequence does not fit.
    """
    context = config.model.context_length or model.max_position_embeddings
    useful = -(-min(context, USEFUL_TOKENS) // geometry.page_size)
    if device.type == "cpu":
        return max(useful, _cpu_pages(config, geometry))
    free, total = torch.cuda.mem_get_info(device)
    allowed = int(total * config.cache.mem_fraction_static)
    shortfall = max(0, workspace_bytes(config, model, geometry.itemsize) - (total - allowed))
    pages = (allowed - (total - free) - shortfall) // geometry.page_bytes
    if pages < useful:
        raise OutOfMemoryError(
            f"{device} has {total / GIB:.1f} GiB, {free / GIB:.1f} GiB free after the weights; with "
            f"--mem-fraction-static {config.cache.mem_fraction_static} that leaves {max(pages, 0)} pages of "
            f"{geometry.page_bytes} bytes, at least {useful} are needed",
            param="mem_fraction_static",
        )
    return pages


def _cpu_pages(config: ServerConfig, geometry: PoolGeometry) -> int:
    pages = CPU_POOL_BYTES // geometry.tp_size // geometry.page_bytes
    if config.cache.max_total_tokens is None:
        return pages
    wanted = -(-config.cache.max_total_tokens // geometry.page_size)
    if config.lora.enable_lora:
        rank = config.lora.max_lora_rank or ROOM_RANK
        full = adapter_layout(geometry, [[rank] * NUM_MODULES] * geometry.num_layers)
        wanted += config.lora.max_loras_per_batch * full.num_pages
    return min(pages, wanted)


def workspace_bytes(config: ServerConfig, model: ModelConfig, itemsize: int) -> int:
    """A generous estimate of what steps need on a rank beside weights and pages, the logits and activations of graphs included."""
    tp_size = config.parallel.tp_size
    # Residual, normed input, output and their fp32 shadows; fused gate_up, its activation, fused qkv.
    per_token = (
        itemsize * (4 * model.hidden_size + 4 * model.intermediate_size // tp_size) + 8 * model.hidden_size
    )
    # fp32 logits with their gathered copy, sorted copies and fixed-point masses.
    per_sample = 40 * model.vocab_size
    graph_rows = min(config.schedule.cuda_graph_max_bs, config.schedule.max_running_requests)
    piece_tokens = LARGEST_BUCKET if graph_rows and tp_size == 1 else 0
    return (
        (config.schedule.chunked_prefill_size + piece_tokens) * per_token
        + config.schedule.max_running_requests * per_sample
        + graph_rows * itemsize * model.vocab_size
    )


def num_host_pages_that_fit(config: ServerConfig, geometry: PoolGeometry) -> int:
    """Pages of one rank's host arena: its share of `host_fraction` of the memory that is available now."""
    if not config.lora.enable_lora:
        return 0
    share = available_host_bytes() * config.cache.host_fraction / config.parallel.tp_size
    return int(share) // geometry.page_bytes


def available_host_bytes() -> int:
    """What can be allocated without swapping: as the kernel says, within the control group's limit."""
    available = _fields(Path("/proc/meminfo"))["MemAvailable"] * 1024
    for limit_file, used_file in (_CGROUP_V2_FILES, _CGROUP_V1_FILES):
        if not limit_file.exists():
            continue
        limit = limit_file.read_text().strip()
        if limit != "max":
            cached = _fields(limit_file.with_name("memory.stat"))["inactive_file"]  # given back when needed
            available = min(available, int(limit) - int(used_file.read_text()) + cached)
    return max(0, available)


def _fields(path: Path) -> dict[str, int]:
    """The kernel's lines of a name and a number."""
    lines = (line.replace(":", " ").split() for line in path.read_text().splitlines())
    return {words[0]: int(words[1]) for words in lines}
