"""One set of adapter weights under its own number, and where its copies are."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from manylora.runtime.errors import ErrorInfo
from manylora.runtime.messages import AdapterImage


class HostCopy(Enum):
    NONE = auto()
    LOADING = auto()  # the loader reads it
    QUEUED = auto()  # its image waits for host pages
    STAGING = auto()  # the workers copy it
    STAGED = auto()


class DeviceCopy(Enum):
    NONE = auto()
    COPYING = auto()
    RESIDENT = auto()


@dataclass(slots=True)
class RankAcks:
    """Answers of the ranks to one command; the first error counts."""

    missing: int
    error: ErrorInfo | None = None

    def add(self, error: ErrorInfo | None) -> bool:
        """True when this was the last."""
        self.missing -= 1
        self.error = self.error or error
        return self.missing == 0


@dataclass(slots=True, eq=False)
class Version:
    """`leases` counts live sequences, `num_running` those of them that are admitted."""

    id: int
    name: str
    path: str
    pinned: bool
    digest: str
    num_pages: int
    num_slices: int
    max_rank: int
    named: bool = False  # reachable by its name; otherwise it lives as long as its leases
    leases: int = 0
    num_running: int = 0
    last_use: int = 0
    host: HostCopy = HostCopy.NONE
    host_pages: list[int] = field(default_factory=list[int])
    image: AdapterImage | None = None  # while QUEUED or STAGING
    device: DeviceCopy = DeviceCopy.NONE
    pages: list[int] = field(default_factory=list[int])
    slices: list[int] = field(default_factory=list[int])
    acks: RankAcks = field(default_factory=lambda: RankAcks(0))  # of the staging or copying under way
    copy_failed: bool = False
    unload_calls: list[int] = field(default_factory=list[int])

    @property
    def is_idle(self) -> bool:
        """Resident, and may be evicted."""
        return self.device is DeviceCopy.RESIDENT and not self.num_running and not self.pinned

    @property
    def tier(self) -> str:
        if self.device is DeviceCopy.RESIDENT:
            return "resident"
        return "host" if self.host is HostCopy.STAGED else "disk"
