"""One set of adapter weights under its own number, and where its copies are."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

from manylora.lora.page_layout import MODULES
from manylora.runtime.errors import ErrorInfo
from manylora.runtime.messages import AdapterImage, LoadAdapter
from manylora.scheduler.adapter_record import AdapterRecord


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
    """`leases` counts live sequences, `num_running` those of them that are admitted. `record` is of its name, and shared
    with the versions that it replaces. `failed`: its last staging or copy was an error; a pin alone does not try again.
    """

    id: int
    name: str
    path: str
    pinned: bool
    digest: str
    num_pages: int
    num_slices: int
    max_rank: int
    revision: str = ""
    modules: tuple[str, ...] = ()
    num_bytes: int = 0
    loaded_at: float = 0.0  # seconds since 1970
    record: AdapterRecord = field(default_factory=AdapterRecord)
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
    failed: bool = False

    @classmethod
    def of(cls, number: int, call: LoadAdapter, image: AdapterImage) -> Version:
        """What `call` asks for, as the loader found it."""
        return cls(
            id=number,
            name=call.lora_name,
            path=call.lora_path,
            pinned=call.pinned,
            digest=image.digest,
            num_pages=image.num_pages,
            num_slices=image.num_slices,
            max_rank=max(rank for layer in image.ranks for rank in layer),
            revision=image.revision,
            modules=tuple(
                name for index, name in enumerate(MODULES) if any(layer[index] for layer in image.ranks)
            ),
            num_bytes=image.num_bytes,
        )

    @property
    def is_idle(self) -> bool:
        """Resident, and may be evicted."""
        return self.device is DeviceCopy.RESIDENT and not self.num_running and not self.pinned

    @property
    def tier(self) -> str:
        if self.device is DeviceCopy.RESIDENT:
            return "resident"
        return "host" if self.host is HostCopy.STAGED else "disk"


@dataclass(slots=True, eq=False)
class Load:
    """A LoadAdapter call under way; `version` from the moment its image is there."""

    call: LoadAdapter
    version: Version | None = None
