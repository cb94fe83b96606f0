"""Page images of an adapter: for every rank the bytes of its pages, in one file of shared memory, rank after rank."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch.nn.functional import pad

from manylora.lora.adapter_weights import Place
from manylora.lora.page_layout import (
    ABSENT,
    NUM_MODULES,
    SLICE_ROWS,
    A,
    AdapterLayout,
    B,
    PoolGeometry,
    Ranks,
    adapter_layout,
)
from manylora.runtime.errors import AdapterLimitError


class Weights(Protocol):
    """What an image is made of: an adapter's ranks, and each of its whole tensors once, in any order."""

    @property
    def ranks(self) -> Ranks: ...

    def read(self) -> Iterator[tuple[Place, torch.Tensor]]: ...


def write_image(path: Path, weights: Weights, geometry: PoolGeometry, dtype: torch.dtype) -> AdapterLayout:
    """Lay the adapter out for every rank into a new file; what no piece covers is zero.

    `weights` has tensors of `dtype`, and may raise. Raises AdapterLimitError if shared memory is full.
    """
    assert dtype.itemsize == geometry.itemsize
    layout = adapter_layout(geometry, weights.ranks)
    rank_bytes = layout.num_pages * geometry.page_bytes
    with open(path, "xb", buffering=0) as file:
        # Written, not mapped: shared memory that is full is then an error and no end of this process, and a page comes
        # into being with its bytes instead of zeroed first.
        file.truncate(rank_bytes * geometry.tp_size)
        for (layer, module, which), tensor in weights.read():
            assert tensor.dtype == dtype
            for index in range(-(-weights.ranks[layer][module] // SLICE_ROWS)):
                flat = (index * geometry.num_layers + layer) * NUM_MODULES + module
                offset = layout.offsets[flat * 2 + which]
                assert offset != ABSENT
                whole = _slice_of(tensor, which, index, layout.widths[flat])
                for tp_rank in range(geometry.tp_size):
                    piece = shard(whole, geometry, module, which, tp_rank)
                    _write(file.fileno(), piece, tp_rank * rank_bytes + offset)
    return layout


def _write(descriptor: int, piece: torch.Tensor, offset: int) -> None:
    data = piece.contiguous().view(torch.uint8).numpy().reshape(-1).data
    written = 0
    try:
        while written < len(data):
            written += os.pwrite(descriptor, data[written:], offset + written)
    except OSError as error:
        raise AdapterLimitError(f"shared memory has no room for the adapter: {error.strerror}") from error


def _slice_of(tensor: torch.Tensor, which: int, index: int, width: int) -> torch.Tensor:
    """Slice `index` of a whole A (rank, in) or B (out, rank), its rank padded with zeros to `width`."""
    dim = 0 if which == A else 1
    if tensor.shape[dim] == width <= SLICE_ROWS:
        return tensor
    rows = min(SLICE_ROWS, tensor.shape[dim] - index * SLICE_ROWS)
    part = tensor.narrow(dim, index * SLICE_ROWS, rows)
    if rows == width:
        return part
    return pad(part, (0, 0, 0, width - rows) if which == A else (0, width - rows))


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
    if size == whole.shape[dim]:
        return whole
    return whole.narrow(dim, tp_rank * parts // tp_size * size, size)
