"""PEFT adapters in pages of a runner's pool, brought there as a worker brings them."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from manylora.lora.adapter_file import open_adapter
from manylora.lora.adapter_image import write_image
from manylora.lora.adapter_weights import bind_adapter
from manylora.lora.delta import HasLoRASites, attach_deltas
from manylora.lora.host_arena import HostArena
from manylora.lora.lora_batch import Collectives
from manylora.lora.weight_pool import WeightPool
from manylora.runtime.model_config import ModelConfig
from manylora.tp_worker.memory_pool import PagePool

Adapters = Mapping[Path, Sequence[int]]  # PEFT's directory -> the adapter's slices, as many as it has


def make_resident(
    adapters: Adapters,
    pool: PagePool,
    pages: Sequence[int],
    model: HasLoRASites,
    config: ModelConfig,
    group: Collectives,
) -> None:
    """Copy each adapter to some of `pages`, in no order, and attach their deltas to the model. One rank alone."""
    geometry, dtype = pool.geometry, pool.elements.dtype
    arena = HostArena(len(pages), geometry.page_bytes, pinned=pool.elements.is_cuda)
    num_slices = 1 + max(max(slices) for slices in adapters.values())
    weights = WeightPool(geometry, pool.elements, num_slices, arena)
    free = random.Random(6).sample(pages, len(pages))
    with tempfile.TemporaryDirectory(prefix="manylora-test-") as directory:
        for version, (adapter_dir, slices) in enumerate(adapters.items()):
            image = Path(directory) / str(version)
            with open_adapter(adapter_dir) as file:
                bound = bind_adapter(file, config, dtype)
                layout = write_image(image, bound, geometry, dtype)
            host_pages = range(layout.num_pages)
            weights.stage(version, str(image), bound.ranks, bound.scalings, host_pages, tp_rank=0)
            weights.copy(version, [free.pop() for _ in host_pages], slices)
            while weights.copying:
                weights.done()
    attach_deltas(model, weights, group, "slora")
