"""Page images of an adapter: for every rank the bytes of its pages, in one file of shared memory, rank after rank."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch.nn.functional import pad

from manylora.lora.adapter_weights import AdapterWeights
from manylora.lora.page_layout import (
    ABSENT,
    NUM_MODULES,
    SLICE_ROWS,
    A,
    AdapterLayout,
    B,
    PoolGeometry,
    adapter_layout,
)
from manylora.runtime.errors import AdapterLimitError


def write_image(
    path: Path, weights: AdapterWeights, geometry: PoolGeometry, dtype: torch.dtype
) -> AdapterLayout:
    """Lay the adapter out for every rank into a new file; what no piece covers is zero.

    Raises AdapterLimitError if shared memory is full.
    """
    layout = adapter_layout(geometry, weights.ranks)
    total_bytes = layout.num_pages * geometry.page_bytes * geometry.tp_size
    with open(path, "xb") as file:
        try:
            # Reserves the memory now: a write into a full /dev/shm through the map would kill this process.
            os.posix_fallocate(file.fileno(), 0, total_bytes)
            _fill(path, weights, geometry, layout, dtype)
        except OSError as error:
            raise AdapterLimitError(
                f"shared memory has no room for the adapter's {total_bytes} bytes: {error.strerror}"
            ) from error
    return layout


def _fill(
    path: Path,
    weights: AdapterWeights,
    geometry: PoolGeometry,
    layout: AdapterLayout,
    dtype: torch.dtype,
) -> None:
    rank_elements = layout.num_pages * geometry.page_bytes // geometry.itemsize
    mapped = torch.from_file(str(path), shared=True, size=rank_elements * geometry.tp_size, dtype=dtype)
    images = mapped.view(geometry.tp_size, rank_elements)
    for flat, width in enumerate(layout.widths):
        if width == 0:
            continue
        module = flat % NUM_MODULES
        index, layer = divmod(flat // NUM_MODULES, geometry.num_layers)
        for which in (A, B):
            offset = layout.offsets[flat * 2 + which]
            assert offset != ABSENT
            whole = _slice_of(weights.tensors[layer, module][which], which, index, width)
            for tp_rank in range(geometry.tp_size):
                piece = shard(whole, geometry, module, which, tp_rank)
                start = offset // geometry.itemsize
                images[tp_rank, start : start + piece.numel()] = piece.reshape(-1)


def _slice_of(tensor: torch.Tensor, which: int, index: int, width: int) -> torch.Tensor:
    """Slice `index` of a whole A (rank, in) or B (out, rank), its rank padded with zeros to `width`."""
    first = index * SLICE_ROWS
    if which == A:
        rows = tensor[first : first + SLICE_ROWS]
        return pad(rows, (0, 0, 0, width - len(rows)))
    columns = tensor[:, first : first + SLICE_ROWS]
    return pad(columns, (0, width - columns.shape[1]))


def shard(whole: torch.Tensor, geometry: PoolGeometry, module: int, which: int, tp_rank: int) -> torch.Tensor:
    """The piece of one rank out of a slice's whole A (width, in) or B (out, width): `page_layout`'s table."""
    shape = geometry.modules[module]
    if which == B:
        return _part(whole, 0, shape.out_local, geometry.tp_size, tp_rank)
    rows = _part(whole, 0, len(whole) // shape.a_split, geometry.tp_size, tp_rank)
    return _part(rows, 1, shape.in_local, geometry.tp_size, tp_rank)


def _part(whole: torch.Tensor, dim: int, size: int, tp_size: int, tp_rank: int) -> torch.Tensor:
    """`size` of `whole` along `dim` for a rank; where there are fewer parts than ranks, neighbours share one."""
    parts = whole.shape[dim] // size
    return whole.narrow(dim, tp_rank * parts // tp_size * size, size)
