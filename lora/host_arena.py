"""A worker's host copies of adapters: page-sized host pages, allocated once, pinned where a GPU reads them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class HostArena:
    """`pages` is (num_host_pages, page_bytes) uint8; the scheduler says what lies where."""

    def __init__(self, num_host_pages: int, page_bytes: int, pinned: bool) -> None:
        self.pages = torch.empty((num_host_pages, page_bytes), dtype=torch.uint8, pin_memory=pinned)
        self._rows = self.pages.numpy()

    def read(self, path: str, offset: int, host_pages: Sequence[int]) -> None:
        """Copy consecutive pages of file `path`, from byte `offset` on, into `host_pages`. Raises OSError."""
        with open(path, "rb") as file:
            file.seek(offset)
            for page in host_pages:
                if file.readinto(self._rows[page]) < self._rows.shape[1]:
                    raise OSError(f"{path} ends before its last page")
