"""Adapters' copies in device memory: the commands that make a version resident, and what their answers mean."""

from __future__ import annotations

from manylora.runtime.messages import CopyAdapter, pack_i32
from manylora.scheduler.memory import Memory
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.version import DeviceCopy, HostCopy, RankAcks, Version


class DeviceTier:
    def __init__(self, memory: Memory, tp_size: int, outbox: Outbox) -> None:
        self._memory = memory
        self._tp_size = tp_size
        self._outbox = outbox

    def make_resident(self, version: Version) -> bool:
        """Start the copy of a version that is on the host, unless it is resident or under way; False: no room now."""
        if version.device is not DeviceCopy.NONE:
            return True
        assert version.host is HostCopy.STAGED
        if not self._memory.take_adapter(version):
            return False
        version.device = DeviceCopy.COPYING
        version.acks = RankAcks(self._tp_size)
        self._outbox.to_workers.append(
            CopyAdapter(version.id, pack_i32(version.pages), pack_i32(version.slices))
        )
        return True

    def copied(self, version: Version) -> None:
        """Every rank has answered."""
        version.device = DeviceCopy.RESIDENT
        version.failed = version.acks.error is not None
        if version.failed:
            self.drop(version)
        else:
            version.record.loads += 1

    def drop(self, version: Version) -> None:
        """Free the pages of a version that nothing runs any more."""
        assert version.device is not DeviceCopy.COPYING
        if version.device is DeviceCopy.RESIDENT:
            self._memory.free_adapter(version)
