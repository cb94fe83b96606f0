"""One copy to the device and one copy back per step, asynchronous on CUDA through rings of pinned buffers."""

from __future__ import annotations

import torch

RING = (
    4  # steps; the scheduler keeps at most two in flight, so a slot is always free by the time it comes round
)
_FIRST_CAPACITY = 1 << 16  # int32 of a pinned buffer; doubled when a step needs more


class _PinnedBuffer:
    """A growing pinned int32 buffer and the event after which it may be reused."""

    def __init__(self) -> None:
        self._buffer = torch.empty(_FIRST_CAPACITY, dtype=torch.int32, pin_memory=True)
        self.event = torch.cuda.Event()

    def take(self, size: int) -> torch.Tensor:
        """The first `size` int32, once the copy that used them last is over."""
        self.event.synchronize()
        if size > self._buffer.numel():
            self._buffer = torch.empty(2 * size, dtype=torch.int32, pin_memory=True)
        return self._buffer[:size]


class Upload:
    """Brings packed int32 payloads to the device: payload -> (its size,) int32."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring = [_PinnedBuffer() for _ in range(RING)] if device.type == "cuda" else []
        self._turn = 0

    def __call__(self, payload: bytes) -> torch.Tensor:
        host = torch.frombuffer(bytearray(payload), dtype=torch.int32)
        if not self._ring:
            return host
        slot = self._ring[self._turn]
        self._turn = (self._turn + 1) % RING
        staged = slot.take(host.numel())
        staged.copy_(host)
        on_device = staged.to(self._device, non_blocking=True)
        slot.event.record()
        return on_device


class Columns:
    """Named columns of results on their way to the host in one copy. int32 and float32 only."""

    def __init__(self, flat: torch.Tensor, sizes: dict[str, int], event: torch.cuda.Event | None) -> None:
        self._flat = flat
        self._sizes = sizes
        self._event = event

    def ready(self) -> bool:
        return self._event is None or self._event.query()

    def to_bytes(self) -> dict[str, bytes]:
        """Every column's bytes. Call once `ready`, and before the ring comes round."""
        packed = self._flat.numpy().tobytes()
        columns: dict[str, bytes] = {}
        start = 0
        for name, size in self._sizes.items():
            columns[name] = packed[4 * start : 4 * (start + size)]
            start += size
        return columns


class Download:
    """Brings result columns to the host."""

    def __init__(self, device: torch.device) -> None:
        self._ring = [_PinnedBuffer() for _ in range(RING)] if device.type == "cuda" else []
        self._turn = 0

    def __call__(self, columns: dict[str, torch.Tensor]) -> Columns:
        """Start the copy of 4-byte tensors (flattened)."""
        sizes = {name: column.numel() for name, column in columns.items()}
        parts = [column.reshape(-1).view(torch.int32) for column in columns.values()]
        flat = torch.cat(parts) if len(parts) > 1 else parts[0]
        if not self._ring:
            return Columns(flat, sizes, None)
        slot = self._ring[self._turn]
        self._turn = (self._turn + 1) % RING
        pinned = slot.take(flat.numel())
        pinned.copy_(flat, non_blocking=True)
        slot.event.record()
        return Columns(pinned, sizes, slot.event)
