"""The resident side of adapters on one rank: which pieces lie where in the page pool.

`stage` brings a version into host pages, `copy` from there into pool pages and slice table rows. Both do what the
scheduler's commands say; nothing is decided here.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from manylora.lora.host_arena import HostArena
from manylora.lora.page_layout import ABSENT, NUM_MODULES, SITES, A, B, PoolGeometry, Ranks, adapter_layout

Scalings = tuple[tuple[float, ...], ...]  # [num_layers][NUM_MODULES]


@dataclass(frozen=True, slots=True)
class SiteTable:
    """The slice table's part of one (layer, site); every tensor is (slice rows, modules of the site)."""

    a_offsets: torch.Tensor  # int64
    b_offsets: torch.Tensor  # int64
    widths: torch.Tensor  # int32
    scalings: torch.Tensor  # float32


class SliceTable:
    """Where each slice's pieces start in the pool, in elements (ABSENT: no piece), how wide, and how scaled."""

    def __init__(self, num_slices: int, num_layers: int, device: torch.device | str) -> None:
        shape = (num_slices, num_layers, NUM_MODULES)
        self.offsets = torch.full((*shape, 2), ABSENT, dtype=torch.int64, device=device)
        self.widths = torch.zeros(shape, dtype=torch.int32, device=device)
        self.scalings = torch.zeros(shape, dtype=torch.float32, device=device)

    def site(self, layer: int, site: int) -> SiteTable:
        """Views, valid for the table's life."""
        first, last = SITES[site][0], SITES[site][-1] + 1
        return SiteTable(
            self.offsets[:, layer, first:last, A],
            self.offsets[:, layer, first:last, B],
            self.widths[:, layer, first:last],
            self.scalings[:, layer, first:last],
        )

    def write(
        self, rows: torch.Tensor, offsets: torch.Tensor, widths: torch.Tensor, scalings: torch.Tensor
    ) -> None:
        """Fill `rows` (int64) from tensors on the host, without waiting for the device."""
        device = self.offsets.device
        rows = rows.to(device, non_blocking=True)
        for column, values in ((self.offsets, offsets), (self.widths, widths), (self.scalings, scalings)):
            column.index_copy_(0, rows, values.to(device, non_blocking=True))


@dataclass(frozen=True, slots=True)
class _Staged:
    """A version's host copy: its host pages in order, and its table rows with offsets as if pages were adjacent."""

    host_pages: tuple[int, ...]
    offsets: torch.Tensor  # (slices, layers, modules, 2) int64, elements
    widths: torch.Tensor  # (slices, layers, modules) int32
    scalings: torch.Tensor  # (slices, layers, modules) float32


class WeightPool:
    """Adapters in the page pool of one rank.

    elements: the pool as one flat tensor of the model's dtype; page p starts at element p · page_bytes / itemsize.
    table: the slice table on the host, read by the reference ops; device_table: the same for kernels, beside the pool.

    `stage` and `forget` may run in another thread than `copy` and `done`.
    """

    def __init__(
        self, geometry: PoolGeometry, elements: torch.Tensor, num_slices: int, arena: HostArena
    ) -> None:
        self.geometry = geometry
        self.elements = elements
        self._page_elements = geometry.page_bytes // geometry.itemsize
        num_pages = elements.numel() // self._page_elements
        self._pages = elements[: num_pages * self._page_elements].view(num_pages, self._page_elements)
        self._arena = arena
        self._host_pages = arena.pages.view(elements.dtype)
        self.table = SliceTable(num_slices, geometry.num_layers, "cpu")
        on_cuda = elements.device.type == "cuda"
        self.device_table = (
            SliceTable(num_slices, geometry.num_layers, elements.device) if on_cuda else self.table
        )
        self._stream = torch.cuda.Stream(elements.device) if on_cuda else None
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(elements.device))  # the tables' first values
        self._staged: dict[int, _Staged] = {}
        self._copies: deque[tuple[int, torch.cuda.Event | None]] = deque()

    def stage(
        self,
        version: int,
        path: str,
        ranks: Ranks,
        scalings: Scalings,
        host_pages: Sequence[int],
        tp_rank: int,
    ) -> None:
        """Read this rank's image of the adapter out of `path` into `host_pages`. Raises OSError."""
        geometry = self.geometry
        layout = adapter_layout(geometry, ranks)
        assert len(host_pages) == layout.num_pages
        if self._stream is not None:
            self._stream.synchronize()  # an earlier copy may still read these host pages
        self._arena.read(path, tp_rank * layout.num_pages * geometry.page_bytes, host_pages)
        shape = (layout.num_slices, geometry.num_layers, NUM_MODULES)
        offsets = torch.tensor(layout.offsets, dtype=torch.int64).view(*shape, 2)
        self._staged[version] = _Staged(
            tuple(host_pages),
            torch.where(offsets == ABSENT, ABSENT, offsets // geometry.itemsize),
            torch.tensor(layout.widths, dtype=torch.int32).view(shape),
            torch.tensor(scalings, dtype=torch.float32).expand(shape).contiguous(),
        )

    def forget(self, version: int) -> None:
        """Drop the host copy; what is resident stays."""
        self._staged.pop(version, None)

    def copy(self, version: int, pages: Sequence[int], slices: Sequence[int]) -> None:
        """Start copying a staged version into `pages` and rows `slices` of the table; `done` tells when it is complete.

        Nothing in flight may touch `pages` or use `slices`.
        """
        staged = self._staged[version]
        assert len(pages) == len(staged.host_pages)
        assert len(slices) == len(staged.widths)
        adjacent = staged.offsets
        page_starts = torch.tensor(pages, dtype=torch.int64) * self._page_elements
        page = torch.clamp(adjacent, min=0) // self._page_elements
        offsets = torch.where(adjacent == ABSENT, ABSENT, page_starts[page] + adjacent % self._page_elements)
        rows = torch.tensor(slices, dtype=torch.int64)
        self.table.write(rows, offsets, staged.widths, staged.scalings)
        if self._stream is None:
            self._copy_pages(staged.host_pages, pages)
            self._copies.append((version, None))
            return
        with torch.cuda.stream(self._stream):
            # The table first: it comes from pageable memory, so that behind the pages the host would wait for them.
            self.device_table.write(rows, offsets, staged.widths, staged.scalings)
            self._copy_pages(staged.host_pages, pages)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._copies.append((version, event))

    def done(self) -> list[int]:
        """Versions whose copies completed since the last call, in the order they were started. Never waits."""
        versions: list[int] = []
        while self._copies and ((event := self._copies[0][1]) is None or event.query()):
            versions.append(self._copies.popleft()[0])
        return versions

    @property
    def copying(self) -> bool:
        """Whether some copy has not been reported by `done` yet."""
        return bool(self._copies)

    def _copy_pages(self, host_pages: Sequence[int], pages: Sequence[int]) -> None:
        for source, target in zip(host_pages, pages, strict=True):
            self._pages[target].copy_(self._host_pages[source], non_blocking=True)
