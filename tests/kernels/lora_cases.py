"""Steps with many adapters for the LoRA kernels: a pool and planes full of NaN, slices of all widths, popularity patterns.

The expected result is that of the reference ops on the host.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from manylora.kernels.addend import Addend
from manylora.kernels.lora_expand import lora_expand
from manylora.kernels.lora_expand_triton import lora_expand as lora_expand_triton
from manylora.kernels.lora_shrink import lora_shrink
from manylora.kernels.lora_shrink_triton import lora_shrink as lora_shrink_triton
from manylora.kernels.lora_work import LoRAWork
from manylora.kernels.lora_work_triton import list_work

NAN = float("nan")
PATTERNS = ("distinct", "uniform", "zipf", "identical", "skewed")
RANKS = (8, 16, 64, 1, 24, 40, 33, 80)


def popular_runs(
    pattern: str, num_tokens: int, num_adapters: int, seed: int = 0
) -> list[tuple[int, int | None]]:
    """Sorted runs (tokens, adapter) of a decode step in which adapters are as popular as the pattern says.

    One token in nine has no adapter; those come as two runs.
    """
    chance = random.Random(seed)
    weights = {
        "distinct": [1.0] * num_adapters,
        "uniform": [1.0] * num_adapters,
        "zipf": [1 / (rank + 1) for rank in range(num_adapters)],
        "identical": [1.0] + [0.0] * (num_adapters - 1),
        "skewed": [20.0] + [1.0] * (num_adapters - 1),
    }[pattern]
    base = num_tokens // 9
    if pattern == "distinct":
        chosen = [i % num_adapters for i in range(num_tokens - base)]
    else:
        chosen = chance.choices(range(num_adapters), weights, k=num_tokens - base)
    counts = {adapter: chosen.count(adapter) for adapter in sorted(set(chosen))}
    runs: list[tuple[int, int | None]] = [(count, adapter) for adapter, count in counts.items()]
    if base > 1:
        runs.insert(len(runs) // 2, (base // 2, None))
    return [*runs, (base - base // 2, None)] if base else runs


class Site:
    """One site's weights of some adapters in a pool, on the host and, for the kernels, on `device`."""

    def __init__(
        self,
        features: int,
        out_sizes: Sequence[int],
        ranks: Sequence[int],
        dtype: torch.dtype,
        device: str = "cpu",
        absent: Sequence[tuple[int, int]] = (),
    ) -> None:
        """`ranks` of the adapters; `absent` (adapter, module) pairs have no weights."""
        self.features, self.out_sizes, self.device = features, tuple(out_sizes), device
        modules = len(out_sizes)
        num_rows = sum(-(-rank // 16) for rank in ranks) + 3
        free_rows = random.Random(1).sample(range(num_rows), num_rows)
        shape = (num_rows, modules)
        self.a_offsets = torch.full(shape, -1, dtype=torch.int64)
        self.b_offsets = self.a_offsets.clone()
        self.widths = torch.full(shape, 999, dtype=torch.int32)
        self.scalings = torch.full(shape, NAN)
        pieces: list[torch.Tensor] = []
        self._used = 32
        generator = torch.Generator().manual_seed(2)
        self.rows: list[list[int]] = []
        for adapter, rank in enumerate(ranks):
            self.rows.append([free_rows.pop() for _ in range(-(-rank // 16))])
            for index, row in enumerate(self.rows[-1]):
                width = -(-min(16, rank - 16 * index) // 8) * 8
                for module, out_size in enumerate(out_sizes):
                    if (adapter, module) in absent:
                        continue
                    lora_a = torch.randn(width, features, generator=generator) * features**-0.5
                    lora_b = torch.randn(out_size, width, generator=generator) * rank**-0.5
                    self.a_offsets[row, module] = self._place(pieces, lora_a)
                    self.b_offsets[row, module] = self._place(pieces, lora_b)
                    self.widths[row, module] = width
                    self.scalings[row, module] = 0.5 + module
        self.pages = torch.full((self._used,), NAN, dtype=dtype)
        start = 32
        for piece in pieces:
            self.pages[start : start + piece.numel()] = piece.reshape(-1)
            start += -(-piece.numel() // 32) * 32 + 32
        self.device_pages = self.pages.to(device)
        # Copied here, because a copy from the host cannot be captured.
        self._device_tables = [
            table.to(device) for table in (self.a_offsets, self.b_offsets, self.widths, self.scalings)
        ]

    def _place(self, pieces: list[torch.Tensor], piece: torch.Tensor) -> int:
        start = self._used
        pieces.append(piece)
        self._used += -(-piece.numel() // 32) * 32 + 32
        return start

    def step(self, runs: Sequence[tuple[int, int | None]]) -> tuple[torch.Tensor, torch.Tensor, int]:
        """segments, slices and max_slices of a step with these runs."""
        segments: list[tuple[int, int, int, int]] = []
        slices: list[int] = []
        first = 0
        for count, adapter in runs:
            if adapter is not None:
                segments.append((first, first + count, len(slices), len(self.rows[adapter])))
                slices += self.rows[adapter]
            first += count
        most = max((segment[3] for segment in segments), default=1)
        return (
            torch.tensor(segments, dtype=torch.int32).reshape(-1, 4),
            torch.tensor(slices, dtype=torch.int32),
            most,
        )

    def expected(
        self, runs: Sequence[tuple[int, int | None]], x: torch.Tensor, y: torch.Tensor
    ) -> torch.Tensor:
        """y with the delta, by the reference ops on the host."""
        segments, slices, most = self.step(runs)
        x, y = x.cpu(), y.cpu().clone()
        planes = torch.full((1, most, len(x), 16 * len(self.out_sizes)), NAN)
        lora_shrink(x, self.pages, self.a_offsets, self.widths, segments, slices, planes[0], 1)
        table = (self.b_offsets, self.widths, self.scalings)
        lora_expand(planes, self.pages, *table, segments, slices, y, self.out_sizes)
        return y

    def work(self, runs: Sequence[tuple[int, int | None]], padding: int = 0, room: int = 0) -> LoRAWork:
        """The step for the kernels; `padding` zero segments and `room` more slices than it needs, as in a graph."""
        segments, slices, most = self.step(runs)
        segments = torch.cat((segments, segments.new_zeros(padding, 4)))
        if padding:  # in the middle too
            segments = segments.roll(1, 0)
        num_tokens = sum(count for count, _ in runs)
        work = LoRAWork(
            segments.long().to(self.device),
            slices.long().to(self.device),
            most + room,
            num_tokens,
            16 * len(self.out_sizes),
        )
        list_work(work)
        return work

    def apply(
        self,
        work: LoRAWork,
        x: torch.Tensor,
        y: torch.Tensor,
        parts: int = 1,
        *,
        adds: bool = True,
    ) -> None:
        """Add the delta to y with the kernels, or write it there; as `parts` ranks with 1/parts of every slice's A each
        would."""
        a_offsets, b_offsets, widths, scalings = self._device_tables
        columns = 16 * len(self.out_sizes) // parts
        gathered = []
        for part in range(parts):
            planes = work.planes(self.features, columns).fill_(NAN)
            pages = self._part(part, parts)
            lora_shrink_triton(x, pages, a_offsets, widths, work, planes, parts)
            gathered.append(planes.clone())
        pages = self.device_pages
        table = (b_offsets, widths, scalings)
        lora_expand_triton(torch.stack(gathered), pages, *table, work, y, self.out_sizes, adds=adds)

    def addend(self, work: LoRAWork, x: torch.Tensor, stream: torch.cuda.Stream | None = None) -> Addend:
        """The delta of a decode step for what reads y to add; on `stream`, if there is one: x is ready there, and it is
        waited for.
        """
        a_offsets, b_offsets, widths, scalings = self._device_tables
        planes = work.planes(self.features, 16 * len(self.out_sizes))
        with torch.cuda.stream(stream):
            values = x.new_full((len(x), sum(self.out_sizes)), NAN)
            lora_shrink_triton(x, self.device_pages, a_offsets, widths, work, planes, 1)
            table = (b_offsets, widths, scalings)
            pages = self.device_pages
            lora_expand_triton(
                planes[None],
                pages,
                *table,
                work,
                values,
                self.out_sizes,
                adds=False,
                behind_shrink=stream is not None,
            )
        if stream is not None:
            torch.cuda.current_stream().wait_stream(stream)
        return Addend(values, work.has_adapter)

    def apply_beside(self, work: LoRAWork, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add the delta to y, which `linear_triton` has just been launched to make of x."""
        a_offsets, b_offsets, widths, scalings = self._device_tables
        planes = work.planes(self.features, 16 * len(self.out_sizes))
        lora_shrink_triton(x, self.device_pages, a_offsets, widths, work, planes, 1, beside=True)
        table = (b_offsets, widths, scalings)
        lora_expand_triton(
            planes[None], self.device_pages, *table, work, y, self.out_sizes, behind_shrink=True
        )

    def _part(self, part: int, parts: int) -> torch.Tensor:
        """The pool of a rank: rows [part · width / parts, …) of every A, at the offset of the whole A."""
        if parts == 1:
            return self.device_pages
        pages = torch.full_like(self.pages, NAN)
        for row, module in (self.a_offsets >= 0).nonzero().tolist():
            offset = int(self.a_offsets[row, module])
            size = int(self.widths[row, module]) * self.features // parts
            pages[offset : offset + size] = self.pages[offset + part * size : offset + (part + 1) * size]
        return pages.to(self.device)
