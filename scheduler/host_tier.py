"""Adapters' copies in host memory: which version has one, whose goes when room is needed, and the staging of new ones.

Bounded by the workers' host pages and by `max_loaded_loras`. A copy is dropped least recently used first; never one
that is under way, or that is yet to be copied into device memory for requests that wait or for a pin.
"""

from __future__ import annotations

from collections import deque

from manylora.runtime.messages import AdapterImage, DropAdapter, StageAdapter, pack_i32
from manylora.scheduler.id_pool import IdPool, StepClock
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.version import DeviceCopy, HostCopy, RankAcks, Version


class HostTier:
    def __init__(self, num_pages: int, max_copies: int | None, tp_size: int, outbox: Outbox) -> None:
        self.pool = IdPool(num_pages, StepClock())
        self._max_copies = max_copies
        self._tp_size = tp_size
        self._outbox = outbox
        self._copies: dict[int, Version] = {}  # STAGING or STAGED
        self._queue: deque[Version] = deque()

    def enqueue(self, version: Version, image: AdapterImage) -> None:
        """Stage `version` from `image` as soon as there is room."""
        version.host = HostCopy.QUEUED
        version.image = image
        self._queue.append(version)
        self.pump()

    def pump(self) -> None:
        """Stage what waits, in order, as far as there is room."""
        while self._queue and self._make_room(self._queue[0]):
            self._stage(self._queue.popleft())

    def staged(self, version: Version) -> None:
        """Every rank has answered: the image is no longer needed."""
        self._release_image(version)
        version.host = HostCopy.STAGED

    def drop(self, version: Version) -> None:
        """Forget a version's host copy, on every rank, or its place in the queue."""
        if version.host is HostCopy.QUEUED:
            self._queue.remove(version)
            self._release_image(version)
        elif version.host is HostCopy.STAGED:
            del self._copies[version.id]
            self.pool.free(version.host_pages)
            version.host_pages = []
            self._outbox.to_workers.append(DropAdapter(version.id))
        version.host = HostCopy.NONE

    def _stage(self, version: Version) -> None:
        image = version.image
        assert image is not None
        version.host = HostCopy.STAGING
        version.host_pages = self.pool.take(version.num_pages)
        version.acks = RankAcks(self._tp_size)
        self._copies[version.id] = version
        pages = pack_i32(version.host_pages)
        self._outbox.to_workers.append(
            StageAdapter(version.id, image.path, image.ranks, image.scalings, pages)
        )

    def _make_room(self, version: Version) -> bool:
        """Drop the copies unused for longest until `version` fits; False, and none dropped, if it cannot yet."""
        short = version.num_pages - self.pool.num_free
        over = 0 if self._max_copies is None else len(self._copies) + 1 - self._max_copies
        victims: list[Version] = []
        for victim in sorted(filter(_may_drop, self._copies.values()), key=lambda v: v.last_use):
            if short <= 0 and over <= 0:
                break
            victims.append(victim)
            short -= victim.num_pages
            over -= 1
        if short > 0 or over > 0:
            return False
        for victim in victims:
            self.drop(victim)
        return True

    def _release_image(self, version: Version) -> None:
        assert version.image is not None
        self._outbox.released_images.append(version.image.path)
        version.image = None


def _may_drop(version: Version) -> bool:
    if version.host is not HostCopy.STAGED or version.device is DeviceCopy.COPYING:
        return False
    if version.device is DeviceCopy.RESIDENT:
        return True
    return not version.leases and (version.failed or not version.pinned)
