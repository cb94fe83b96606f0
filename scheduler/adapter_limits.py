"""What an adapter, a pin and a request must fit beside, so that every admitted request can finish alone.

Pinned adapters never leave memory. So a request needs its KV and its adapter beside all of them, and every other
adapter needs room beside them and one page of KV. In host memory each adapter only has to fit alone: a resident one
needs no copy there.
"""

from __future__ import annotations

from collections.abc import Iterable

from manylora.runtime.errors import AdapterLimitError, ContextLengthError
from manylora.scheduler.memory import PoolLimits
from manylora.scheduler.sequence import Sequence
from manylora.scheduler.version import Version


class FitChecker:
    def __init__(self, limits: PoolLimits, *, page_size: int, max_kv_pages: int) -> None:
        self._limits = limits
        self._page_size = page_size
        self._max_kv_pages = max_kv_pages

    def check_sequence(self, sequence: Sequence, version: Version | None, pinned: Iterable[Version]) -> None:
        """Raise ContextLengthError if the sequence could not even run alone."""
        pages = self._kv_pages(sequence)
        held = _pages(v for v in pinned if v is not version)
        own = version.num_pages if version else 0
        room = min(self._max_kv_pages, self._limits.num_pages - held - own)
        if pages > room:
            raise ContextLengthError(
                f"The request needs memory for {sequence.kv_tokens} tokens (prompt and max_new_tokens); with its "
                f"adapter and the pinned ones the pool holds {max(0, room) * self._page_size}."
            )

    def check_adapter(
        self,
        new: Version,
        versions: Iterable[Version],
        sequences: Iterable[Sequence],
        replaced: Version | None = None,
    ) -> None:
        """Raise AdapterLimitError if `new` cannot be served beside the pinned adapters, or, itself pinned, would leave
        no room for a live request or another adapter. `replaced` loses its pin when `new` takes its name.
        """
        pinned = [v for v in versions if v.pinned and v is not replaced and v is not new]
        if new.pinned:
            pinned.append(new)
        others = [v for v in versions if v not in pinned]
        others += [] if new.pinned else [new]
        kv_alone = max(
            (self._kv_pages(s) for s in sequences if s.version is None or s.version in pinned), default=1
        )
        kv_beside = max((self._kv_pages(s) + s.version.num_pages for s in sequences if s.version), default=1)
        largest = max((v.num_pages for v in others), default=0)
        held = _pages(pinned)
        limits = self._limits
        self._refuse_over(new, "pages", held + max(kv_alone, kv_beside, largest + 1), limits.num_pages)
        slices = sum(v.num_slices for v in pinned) + max((v.num_slices for v in others), default=0)
        self._refuse_over(new, "slices", slices, limits.num_slices)
        self._refuse_over(new, "host pages", new.num_pages, limits.num_host_pages)

    def check_pin(self, version: Version, versions: Iterable[Version], sequences: Iterable[Sequence]) -> None:
        """Raise AdapterLimitError if `version`, which is not pinned, could not be served beside the others if it were."""
        version.pinned = True
        try:
            self.check_adapter(version, versions, sequences)
        finally:
            version.pinned = False

    def _kv_pages(self, sequence: Sequence) -> int:
        return -(-sequence.kv_tokens // self._page_size)

    def _refuse_over(self, version: Version, what: str, needed: int, available: int) -> None:
        if needed > available:
            raise AdapterLimitError(
                f"LoRA adapter {version.name} (rank {version.max_rank}, {version.num_pages} pages, "
                f"{version.num_slices} slices) does not fit: together with the pinned adapters and what must fit beside "
                f"them it needs {needed} {what}, there are {available}.",
                param="lora_path",
            )


def _pages(versions: Iterable[Version]) -> int:
    return sum(v.num_pages for v in versions)
