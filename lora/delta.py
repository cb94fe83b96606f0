"""What an adapter adds to one fused projection: shrink, one collective at most, expand (DESIGN.md section 4).

Whether a collective runs depends only on the plan and the flags, never on what this rank holds: ranks cannot diverge.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch

from manylora.kernels.lora_expand import lora_expand
from manylora.kernels.lora_shrink import lora_shrink
from manylora.lora.lora_batch import Collectives, LoRABatch
from manylora.lora.page_layout import ROW_PARALLEL, SITES, SLICE_ROWS
from manylora.lora.weight_pool import WeightPool


class LoRADelta:
    """The delta of one (layer, site) on one rank. `site` indexes `SITES`."""

    def __init__(self, pool: WeightPool, layer: int, site: int, group: Collectives, sharding: str) -> None:
        geometry = pool.geometry
        shapes = [geometry.modules[module] for module in SITES[site]]
        self._pages = pool.elements
        self._table = pool.table.site(layer, site)
        self._group = group
        self._split = shapes[0].a_split
        self._plane_columns = len(shapes) * geometry.slice_width(SLICE_ROWS) // self._split
        self._out_sizes = tuple(shape.out_local for shape in shapes)
        sharded = sharding == "slora" and group.size > 1
        row_parallel = SITES[site][0] in ROW_PARALLEL
        self._gathers = sharded and not row_parallel
        self._reduces = sharded and row_parallel
        self._first_column = group.rank * self._out_sizes[0] if self._reduces else 0

    def apply(self, x: torch.Tensor, y: torch.Tensor, batch: LoRABatch) -> None:
        """Add the delta to y in place.

        x: (T, in_local). y: column-parallel (T, sum of the modules' out_local), row-parallel (T, hidden), this rank's
        partial sum before the base's all-reduce.
        """
        table = self._table
        planes = x.new_empty((batch.max_slices, x.shape[0], self._plane_columns), dtype=torch.float32)
        lora_shrink(
            x,
            self._pages,
            table.a_offsets,
            table.widths,
            batch.segments,
            batch.slices,
            planes,
            self._split,
        )
        if self._gathers:
            parts = self._group.all_gather(planes)
        elif self._reduces:
            parts = self._group.all_reduce(planes)[None]
        else:
            parts = planes[None]
        columns = sum(self._out_sizes)
        lora_expand(
            parts,
            self._pages,
            table.b_offsets,
            table.widths,
            table.scalings,
            batch.segments,
            batch.slices,
            y[:, self._first_column : self._first_column + columns],
            self._out_sizes,
        )


class LoRASite(Protocol):
    """A linear layer that adds `lora.apply(x, y, batch)` to its product."""

    lora: Any  # None or a LoRADelta; the layer has its own Protocol of it


class HasLoRASites(Protocol):
    def lora_sites(self) -> Iterable[tuple[int, int, LoRASite]]:
        """(layer, site as an index of SITES, the site's linear layer), every one once."""
        ...


def attach_deltas(model: HasLoRASites, pool: WeightPool, group: Collectives, sharding: str) -> None:
    """Give every LoRA site of the model its delta."""
    for layer, site, linear in model.lora_sites():
        linear.lora = LoRADelta(pool, layer, site, group, sharding)
