"""The work list of a step's LoRA kernels, made on the device: every site of every layer goes through the same list.

A kernel's grid depends on host integers alone; how much of it has work is read from the list. So one captured graph
serves any mix of adapters, ranks and tokens without an adapter.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from manylora.kernels.gpu import multiprocessors

DECODE_TOKENS = 256  # up to here a step counts as decode: adapters are many, their tokens few
DECODE_TILE, PREFILL_TILE = 8, 64
TILE_FIELDS, ITEM_FIELDS = 8, 4  # integers of each; whole sectors of memory
# The fewer tiles a decode step can have, the more chunks keep its programs busy: (at most so many tokens, chunks).
_DECODE_CHUNKS, _PREFILL_CHUNKS = ((32, 16), (DECODE_TOKENS, 8)), 4
_MIN_CHUNK = 128  # input features
_REGISTERS = 1 << 16  # of a multiprocessor
_FULL_TILES = 64  # with as many prefill tiles a GPU is full without chunks


class Launch(NamedTuple):
    """How a kernel is launched: what is measured, not derived."""

    programs: int  # for every multiprocessor
    block: int  # input features that a shrink takes at once, outputs that an expand does
    num_warps: int
    num_stages: int


class LoRAWork:
    """Buffers of one step, or of every step of one captured graph; `list_work` fills them.

    segments: (num_segments, 4) and slices: (num_slice_refs,), any integer type, on the device: see `LoRABatch`. Segments
        that are all zero are padding.
    max_slices: the most slices any segment has.
    num_tokens: rows of the activations.
    plane_columns: the most columns of a plane that any site needs.
    lender: an older one, never in use at the same time, whose memory for planes is used if it is large enough.

    tiles: (max_tiles, TILE_FIELDS) int32: first token, tokens (≤ tile_tokens), first entry in `slices`, number of slices,
        and what that entry is: the first slice's row of the slice table. The other fields are undefined.
    items: (max_items, ITEM_FIELDS) int32: first token, tokens, row of the slice table, plane: one for each slice of each
        tile. Behind the last tile and the last item, `tokens` is 0.
    num_tiles: (1,) int32.
    has_adapter: (num_tokens,) int32 of a decode step: 1 for tokens of some segment, else 0.
    """

    def __init__(
        self,
        segments: torch.Tensor,
        slices: torch.Tensor,
        max_slices: int,
        num_tokens: int,
        plane_columns: int,
        lender: LoRAWork | None = None,
    ) -> None:
        device = segments.device
        self.segments = segments
        self.slices = slices
        self.max_slices = max_slices
        self.num_tokens = num_tokens
        self._plane_columns = plane_columns
        self.decode = num_tokens <= DECODE_TOKENS
        self.tile_tokens = DECODE_TILE if self.decode else PREFILL_TILE
        self.max_tiles = min(num_tokens, num_tokens // self.tile_tokens + len(segments))
        self.max_items = self.max_tiles * max_slices
        self.tiles = torch.empty((self.max_tiles, TILE_FIELDS), dtype=torch.int32, device=device)
        self.items = torch.empty((self.max_items, ITEM_FIELDS), dtype=torch.int32, device=device)
        self.num_tiles = torch.empty(1, dtype=torch.int32, device=device)
        self.has_adapter = torch.empty(num_tokens if self.decode else 0, dtype=torch.int32, device=device)
        self._plane_elements = max_slices * num_tokens * plane_columns
        size = self._num_chunks() * self._plane_elements
        if lender is not None and lender._planes.numel() >= size:
            self._planes = lender._planes
        else:
            self._planes = torch.empty(size, dtype=torch.float32, device=device)

    def resized(self, segments: torch.Tensor, num_tokens: int) -> LoRAWork:
        """The like of it for another step with the same slices."""
        return LoRAWork(segments, self.slices, self.max_slices, num_tokens, self._plane_columns, self)

    def planes(self, features: int, columns: int) -> torch.Tensor:
        """Where a shrink of `features` inputs writes: (chunks, max_slices, num_tokens, columns) float32.

        The same memory for every site: it is used up before the next site's shrink.
        """
        shape = (self._num_chunks(features), self.max_slices, self.num_tokens, columns)
        return self._planes[: shape[0] * shape[1] * shape[2] * shape[3]].view(shape)

    def _num_chunks(self, features: int | None = None) -> int:
        """Into how many chunks of its input features a shrink is split, so that enough programs have work; the most
        that any site has, if `features` is None.

        Few different numbers, because each is a compilation of both kernels.
        """
        if self.decode:
            most = next(chunks for tokens, chunks in _DECODE_CHUNKS if self.num_tokens <= tokens)
        else:
            most = 1 if self.num_tokens >= _FULL_TILES * self.tile_tokens else _PREFILL_CHUNKS
        if features is None:
            return most
        return 1 << max(1, min(most, features // _MIN_CHUNK)).bit_length() - 1


def num_programs(device: torch.device, each: int) -> int:
    """`each` programs for every multiprocessor; a few where an interpreter runs them."""
    if device.type != "cuda":
        return 5
    return each * multiprocessors(device)


def registers(launch: Launch) -> int:
    """Of a thread, at most, so that as many programs as are launched fit on a multiprocessor."""
    return min(255, _REGISTERS // (launch.programs * launch.num_warps * 32) // 8 * 8)
