"""lora_shrink: x·Aᵀ of every token with the adapter of its segment, one plane per rank slice."""

from __future__ import annotations

import torch


def lora_shrink(
    x: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    segments: torch.Tensor,
    slices: torch.Tensor,
    planes: torch.Tensor,
    split: int,
) -> None:
    """Write the planes of one site, in float32.

    x: (T, in) activations.
    pages: (elements,) the page pool, of x's dtype.
    offsets: (slice rows, modules) int64, first element of the A piece in `pages`; -1 where the adapter has none.
    widths: (slice rows, modules) int32, width of the slice; an A piece is (width / split, in), row-major.
    segments, slices: see `LoRABatch`.
    planes: (slices, T, modules · plane width), written.

    Semantics:
        for (first, end, entry, count) in segments, p in range(count), m in modules with a piece:
            A = piece(offsets[slices[entry + p], m])
            planes[p, first:end, m · plane width :][: rows of A] = x[first:end] · Aᵀ

    What is not written is undefined, and `lora_expand` does not read it. `offsets`, `widths`, `segments` and `slices`
    of this reference are on the host.
    """
    modules, features = offsets.shape[1], x.shape[1]
    plane_width = planes.shape[2] // modules
    slice_ids = slices.tolist()
    for first, end, entry, count in segments.tolist():
        rows_x = x[first:end].float()
        for p, row in enumerate(slice_ids[entry : entry + count]):
            pieces = zip(offsets[row].tolist(), widths[row].tolist(), strict=True)
            for module, (offset, width) in enumerate(pieces):
                if offset < 0:
                    continue
                rows = width // split
                lora_a = pages[offset : offset + rows * features].view(rows, features)
                column = module * plane_width
                planes[p, first:end, column : column + rows] = rows_x @ lora_a.float().T
