"""A worker's host copies of adapters: page-sized host pages, allocated once, pinned where a GPU reads them."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from manylora.runtime.errors import OutOfMemoryError

_TOUCHING_THREADS = 8
_TOUCHED_AT_ONCE = 256 << 20  # bytes
_READ_AT_ONCE = 256 << 20  # bytes
_MAX_PAGES_AT_ONCE = 1024  # what the system takes in one call


class HostArena:
    """`pages` is (num_host_pages, page_bytes) uint8; the scheduler says what lies where."""

    def __init__(self, num_host_pages: int, page_bytes: int, pinned: bool) -> None:
        # An anonymous mapping, not torch's pinned allocator: that rounds up to a power of two, and small pages make
        # pinning gigabytes take long.
        self._memory = mmap.mmap(-1, max(1, num_host_pages * page_bytes))
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        if pinned:
            _touch(flat)
            weakref.finalize(self, _pin(flat), flat.data_ptr())
        self.pages = flat[: num_host_pages * page_bytes].view(num_host_pages, page_bytes)
        self._rows = self.pages.numpy()

    def read(self, path: str, offset: int, host_pages: Sequence[int]) -> None:
        """Copy consecutive pages of file `path`, from byte `offset` on, into `host_pages`. Raises OSError."""
        page_bytes = self._rows.shape[1]
        at_once = max(1, min(_READ_AT_ONCE // page_bytes, _MAX_PAGES_AT_ONCE))
        with open(path, "rb", buffering=0) as file:
            # Many pages a call: between calls this thread waits for its turn beside the step loop.
            for first in range(0, len(host_pages), at_once):
                rows = [self._rows[page] for page in host_pages[first : first + at_once]]
                start = offset + first * page_bytes
                if os.preadv(file.fileno(), rows, start) < len(rows) * page_bytes:
                    raise OSError(f"{path} ends before its last page")


def _touch(memory: torch.Tensor) -> None:
    """Have the system provide all of it now, by several threads. Pinning would do the same by one, 3 GB a second."""
    bytes_of = memory.numpy()

    def touch(start: int) -> None:
        bytes_of[start : start + _TOUCHED_AT_ONCE : mmap.PAGESIZE] = 0

    with ThreadPoolExecutor(_TOUCHING_THREADS) as threads:
        list(threads.map(touch, range(0, len(bytes_of), _TOUCHED_AT_ONCE)))


def _pin(memory: torch.Tensor) -> Callable[[int], object]:
    """Let the GPU read this memory by itself. Returns what ends it, to be called with the address."""
    cudart = torch.cuda.cudart()
    assert cudart is not None
    error = cudart.cudaHostRegister(memory.data_ptr(), memory.numel(), 0)
    if int(error) != 0:
        raise OutOfMemoryError(
            f"{memory.numel() / 2**30:.1f} GiB of host memory for adapters cannot be pinned (CUDA error {int(error)}); "
            "lower --host-fraction",
            param="host_fraction",
        )
    return cudart.cudaHostUnregister
