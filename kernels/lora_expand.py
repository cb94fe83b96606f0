"""lora_expand: scaling · planes·Bᵀ added to every token's output, with the adapter of its segment."""

from __future__ import annotations

import torch


def lora_expand(
    planes: torch.Tensor,
    pages: torch.Tensor,
    offsets: torch.Tensor,
    widths: torch.Tensor,
    scalings: torch.Tensor,
    segments: torch.Tensor,
    slices: torch.Tensor,
    y: torch.Tensor,
    out_sizes: tuple[int, ...],
) -> None:
    """Add one site's delta to y, in place; sums in float32, rounded once.

    planes: (parts, slices, T, modules · plane width) float32: what `lora_shrink` wrote, gathered from `parts` ranks. Part
        i holds columns [i · width / parts, (i + 1) · width / parts) of a slice of that width.
    pages: (elements,) the page pool, of y's dtype.
    offsets: (slice rows, modules) int64, first element of the B piece in `pages`; -1 where the adapter has none.
    widths: (slice rows, modules) int32; a B piece is (out size of its module, width), row-major.
    scalings: (slice rows, modules) float32.
    segments, slices: see `LoRABatch`.
    y: (T, sum of out_sizes), any row stride; module after module.

    Semantics:
        for (first, end, entry, count) in segments, m in modules, p in range(count) with a piece:
            B = piece(offsets[slices[entry + p], m])
            y[first:end, columns of m] += scalings[…] · planes[:, p, first:end, m] · Bᵀ

    `offsets`, `widths`, `scalings`, `segments` and `slices` of this reference are on the host.
    """
    parts = planes.shape[0]
    plane_width = planes.shape[3] // len(out_sizes)
    slice_ids = slices.tolist()
    for first, end, entry, count in segments.tolist():
        rows = [
            (p, offsets[row].tolist(), widths[row].tolist(), scalings[row].tolist())
            for p, row in enumerate(slice_ids[entry : entry + count])
        ]
        y_column = 0
        for module, out_size in enumerate(out_sizes):
            delta = None
            for p, row_offsets, row_widths, row_scalings in rows:
                offset, width = row_offsets[module], row_widths[module]
                if offset < 0:
                    continue
                lora_b = pages[offset : offset + out_size * width].view(out_size, width)
                column = module * plane_width
                hidden = planes[:, p, first:end, column : column + width // parts]
                hidden = hidden.permute(1, 0, 2).reshape(end - first, width)
                term = (hidden @ lora_b.float().T) * row_scalings[module]
                delta = term if delta is None else delta + term
            if delta is not None:
                target = y[first:end, y_column : y_column + out_size]
                target.copy_(target.float() + delta)
            y_column += out_size
