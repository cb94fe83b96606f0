"""The bodies and answers of the routes below /v1/adapters. `Engine` fills and gives the same."""

from __future__ import annotations

from typing import Annotated

import msgspec

from manylora.runtime.errors import BadRequestError
from manylora.runtime.messages import AdapterState

MAX_SECONDS = 1e9  # thirty years
MAX_PATH_LENGTH = 4096

Version = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
DrainSeconds = Annotated[float, msgspec.Meta(ge=0, le=MAX_SECONDS)]
TtlSeconds = Annotated[float, msgspec.Meta(gt=0, le=MAX_SECONDS)]


class LoadOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`if_version`: only if the name is at this version; 0: only if it is not loaded. `ttl_s`: unload it when no request
    has used it for so many seconds.
    """

    if_version: Version | None = None
    ttl_s: TtlSeconds | None = None


class PutAdapterBody(LoadOptions, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`path` is a directory or a hub id; the rest as in LoadOptions."""

    path: Annotated[str, msgspec.Meta(min_length=1, max_length=MAX_PATH_LENGTH)]
    pinned: bool = False


class PatchAdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is left out stays as it is; `ttl_s` null: no time limit."""

    pinned: bool | msgspec.UnsetType = msgspec.UNSET
    ttl_s: TtlSeconds | msgspec.UnsetType | None = msgspec.UNSET
    if_version: Version | None = None

    @property
    def pin(self) -> bool | None:
        return None if self.pinned is msgspec.UNSET else self.pinned

    def check(self) -> None:
        if self.pinned is msgspec.UNSET and self.ttl_s is msgspec.UNSET:
            raise BadRequestError("give pinned, ttl_s, or both.", param="pinned")


class DeleteAdapterBody(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`drain_s`: how long the requests that use it may go on, null: until they end. `force`: not at all."""

    drain_s: DrainSeconds | None = None
    force: bool = False
    if_version: Version | None = None

    @property
    def patience(self) -> float | None:
        """Seconds that the requests are given; None: as many as they need. Raises BadRequestError."""
        if not self.force:
            return self.drain_s
        if self.drain_s:
            raise BadRequestError("drain_s gives requests time, force gives none; give one.", param="force")
        return 0.0


class AdapterCard(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter, as `AdapterState` of runtime/messages.py says what its fields mean. Times in seconds, those of day since
    1970; bytes and pages: of the weights on all ranks, and on one.
    """

    name: str
    version: int
    path: str
    revision: str | None  # of the hub; null: it is from elsewhere
    digest: str
    rank: int
    modules: list[str]
    bytes: int
    pages: int
    tier: str
    pinned: bool
    ttl_s: float | None
    running: int
    waiting: int
    requests: int
    hits: int
    loads: int
    evictions: int
    tokens: int
    queue_s: float
    loaded_at: float
    last_use: float | None  # null: never

    @classmethod
    def of(cls, state: AdapterState) -> AdapterCard:
        return cls(
            name=state.lora_name,
            version=state.version,
            path=state.lora_path,
            revision=state.revision or None,
            digest=state.digest,
            rank=state.max_rank,
            modules=list(state.modules),
            bytes=state.num_bytes,
            pages=state.num_pages,
            tier=state.tier,
            pinned=state.pinned,
            ttl_s=state.ttl_s,
            running=state.running,
            waiting=state.waiting,
            requests=state.requests,
            hits=state.hits,
            loads=state.loads,
            evictions=state.evictions,
            tokens=state.tokens,
            queue_s=state.queue_s,
            loaded_at=state.loaded_at,
            last_use=state.last_use or None,
        )


class AdapterList(msgspec.Struct, frozen=True):
    """Every loaded adapter in load order."""

    data: list[AdapterCard]
    object: str = "list"
