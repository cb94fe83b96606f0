"""What an adapter adds to one fused projection: shrink, one collective at most, expand (docs/architecture.md).

Whether a collective runs depends only on the plan and the flags, never on what this rank holds: ranks cannot diverge.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum, auto
from typing import Any, Protocol

import torch

from manylora.kernels.addend import Addend
from manylora.kernels.lora_expand import lora_expand
from manylora.kernels.lora_shrink import lora_shrink
from manylora.lora.lora_batch import Collectives, LoRABatch
from manylora.lora.page_layout import ROW_PARALLEL, SITES, SLICE_ROWS
from manylora.lora.weight_pool import WeightPool


class Place(Enum):
    """Where a delta is computed.

    BEFORE: its shrink before the base product, its expand after it. BEHIND: both right behind our own product, which the
    shrink runs beside. APART: both on another stream, beside the product; what reads that adds the delta.
    """

    BEFORE = auto()
    BEHIND = auto()
    APART = auto()


class LoRADelta:
    """The delta of one (layer, site) on one rank. `site` indexes `SITES`.

    A captured step of up to `lora_work.DECODE_TOKENS` tokens computes it beside the base product from `side_stream`, which
    only layers have whose reader can add: it uses what the product leaves idle as it begins and ends. Elsewhere, with few
    tokens, it comes as dependent launches behind our own product. Where a collective follows the shrink, neither is done:
    beside the product it would need a communicator of its own.
    """

    def __init__(
        self,
        pool: WeightPool,
        layer: int,
        site: int,
        group: Collectives,
        sharding: str,
        side_stream: torch.cuda.Stream | None = None,
    ) -> None:
        geometry = pool.geometry
        shapes = [geometry.modules[module] for module in SITES[site]]
        self._pages = pool.elements
        self._table = pool.table.site(layer, site)
        self._device_table = pool.device_table.site(layer, site)
        self._group = group
        self._split = shapes[0].a_split
        self._plane_columns = len(shapes) * geometry.slice_width(SLICE_ROWS) // self._split
        self._out_sizes = tuple(shape.out_local for shape in shapes)
        sharded = sharding == "slora" and group.size > 1
        row_parallel = SITES[site][0] in ROW_PARALLEL
        self._gathers = sharded and not row_parallel
        self._reduces = sharded and row_parallel
        first_column = group.rank * self._out_sizes[0] if self._reduces else 0
        self._y_columns = slice(first_column, first_column + sum(self._out_sizes))
        self._exchanges = sharded
        self._side_stream = None if sharded else side_stream

    def begin(self, x: torch.Tensor, batch: LoRABatch) -> torch.Tensor | None:
        """Call it before the base product. x: (T, in_local). Returns what `finish` takes."""
        place = self._place(x, batch)
        if place is Place.BEHIND:
            return None
        if place is Place.BEFORE:
            return self._shrink(x, batch)
        assert self._side_stream is not None
        self._side_stream.wait_stream(torch.cuda.current_stream())
        return x.new_empty((len(x), sum(self._out_sizes)))

    def finish(
        self, x: torch.Tensor, begun: torch.Tensor | None, y: torch.Tensor, batch: LoRABatch
    ) -> Addend | None:
        """Add the delta to y in place, or return it for what reads y to add; call it right after the base product
        y = `kernels.linear.linear(x, …)`.

        y: column-parallel (T, sum of the modules' out_local), row-parallel (T, hidden), this rank's partial sum before the
        base's all-reduce.
        """
        place = self._place(x, batch)
        if place is Place.APART:
            assert self._side_stream is not None
            assert begun is not None
            assert batch.work is not None
            # Launched after the product, so that it takes only what that leaves.
            with torch.cuda.stream(self._side_stream):
                self._expand(self._shrink(x, batch)[None], begun, batch, place)
            torch.cuda.current_stream().wait_stream(self._side_stream)
            return Addend(begun, batch.work.has_adapter)
        planes = self._shrink(x, batch, beside=True)[None] if begun is None else self._exchange(begun)
        self._expand(planes, y[:, self._y_columns], batch, place)
        return None

    def _place(self, x: torch.Tensor, batch: LoRABatch) -> Place:
        if self._exchanges or batch.work is None or not batch.work.decode or not x.is_cuda:
            return Place.BEFORE
        if self._side_stream is not None and batch.captured:
            return Place.APART
        from manylora.kernels import linear_triton

        return Place.BEHIND if linear_triton.is_faster(x) else Place.BEFORE

    def _shrink(self, x: torch.Tensor, batch: LoRABatch, beside: bool = False) -> torch.Tensor:
        """x·Aᵀ in planes of (chunks, slices, T, plane columns)."""
        if batch.work is None:
            shape = (1, batch.max_slices, x.shape[0], self._plane_columns)
            planes = x.new_empty(shape, dtype=torch.float32)
            lora_shrink(
                x,
                self._pages,
                self._table.a_offsets,
                self._table.widths,
                batch.segments,
                batch.slices,
                planes[0],
                self._split,
            )
            return planes
        from manylora.kernels import lora_shrink_triton

        planes, table = batch.work.planes(x.shape[1], self._plane_columns), self._device_table
        lora_shrink_triton.lora_shrink(
            x, self._pages, table.a_offsets, table.widths, batch.work, planes, self._split, beside=beside
        )
        return planes

    def _exchange(self, planes: torch.Tensor) -> torch.Tensor:
        """(chunks, slices, T, plane columns) of this rank -> (parts, chunks, slices, T, plane columns) of all."""
        if not (self._gathers or self._reduces):
            return planes[None]
        whole = planes.sum(0, keepdim=True) if len(planes) > 1 else planes
        return self._group.all_gather(whole) if self._gathers else self._group.all_reduce(whole)[None]

    def _expand(self, parts: torch.Tensor, y: torch.Tensor, batch: LoRABatch, place: Place) -> None:
        """y += parts·Bᵀ, or y = it where it is APART; parts as `_exchange` returns them."""
        if batch.work is None:
            lora_expand(
                parts[:, 0],
                self._pages,
                self._table.b_offsets,
                self._table.widths,
                self._table.scalings,
                batch.segments,
                batch.slices,
                y,
                self._out_sizes,
            )
            return
        from manylora.kernels import lora_expand_triton

        table = self._device_table
        lora_expand_triton.lora_expand(
            parts,
            self._pages,
            table.b_offsets,
            table.widths,
            table.scalings,
            batch.work,
            y,
            self._out_sizes,
            behind_shrink=place is not Place.BEFORE,
            adds=place is not Place.APART,
        )


class LoRASite(Protocol):
    """A linear layer that calls `lora.begin` before its product and `lora.finish` on it.

    defers: whether it can leave an addend to what reads its product.
    """

    defers: bool
    lora: Any  # None or a LoRADelta; the layer has its own Protocol of it


class HasLoRASites(Protocol):
    def lora_sites(self) -> Iterable[tuple[int, int, LoRASite]]:
        """(layer, site as an index of SITES, the site's linear layer), every one once."""
        ...


def attach_deltas(model: HasLoRASites, pool: WeightPool, group: Collectives, sharding: str) -> None:
    """Give every LoRA site of the model its delta."""
    on_cuda = pool.elements.device.type == "cuda"
    side_stream = torch.cuda.Stream(pool.elements.device) if on_cuda else None
    for layer, site, linear in model.lora_sites():
        linear.lora = LoRADelta(pool, layer, site, group, sharding, side_stream if linear.defers else None)
