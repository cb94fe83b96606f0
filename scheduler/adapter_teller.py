"""What the outside is told of adapters: states put together from versions, records and who uses them, and the replies to
calls about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from manylora.runtime.errors import ErrorInfo
from manylora.runtime.messages import NO_VERSION, AdapterReply, AdapterState
from manylora.scheduler.adapter_record import AdapterRecord
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.sequence import Phase, Sequence
from manylora.scheduler.times import Times
from manylora.scheduler.version import Version


@dataclass(slots=True)
class Use:
    """Live sequences of one record, and what they have generated so far."""

    running: int = 0
    waiting: int = 0
    tokens: int = 0


def _count_use(sequences: Iterable[Sequence]) -> dict[AdapterRecord, Use]:
    """Who uses which adapter, in one pass over the live sequences. Records that nobody uses are missing."""
    uses: dict[AdapterRecord, Use] = {}
    for sequence in sequences:
        if sequence.version is not None:
            use = uses.setdefault(sequence.version.record, Use())
            use.running += sequence.phase is Phase.RUNNING
            use.waiting += sequence.phase is Phase.WAITING
            use.tokens += sequence.num_generated
    return uses


def _describe(version: Version, uses: dict[AdapterRecord, Use], now: float) -> AdapterState:
    """`now`: seconds since 1970."""
    record = version.record
    use = uses.get(record) or Use()
    return AdapterState(
        lora_name=version.name,
        lora_path=version.path,
        version=version.id,
        digest=version.digest,
        pinned=version.pinned,
        tier=version.tier,
        max_rank=version.max_rank,
        num_pages=version.num_pages,
        leases=version.leases,
        revision=version.revision,
        modules=version.modules,
        num_bytes=version.num_bytes,
        running=use.running,
        waiting=use.waiting,
        loads=record.loads,
        evictions=record.evictions,
        hits=record.hits,
        requests=record.requests,
        tokens=record.ended_tokens + use.tokens,
        queue_s=record.queue_s,
        loaded_at=version.loaded_at,
        last_use=now if record.leases else record.last_use,
        ttl_s=record.ttl_s,
    )


class AdapterTeller:
    """`names`: what every name stands for, in load order."""

    def __init__(
        self,
        names: Mapping[str, Version],
        live_sequences: Callable[[], Iterable[Sequence]],
        times: Times,
        outbox: Outbox,
    ) -> None:
        self._names = names
        self._live_sequences = live_sequences
        self._times = times
        self._outbox = outbox

    def states(self) -> list[AdapterState]:
        """Of every adapter that has a name, in load order."""
        uses, now = _count_use(self._live_sequences()), self._times.since_1970()
        return [_describe(version, uses, now) for version in self._names.values()]

    def reply(
        self,
        call: int,
        error: ErrorInfo | None,
        version: Version | None = None,
        replaced: Version | None = None,
    ) -> None:
        """Answer a call: with an error, or with the state of the version that it was about."""
        state = None
        if version is not None:
            state = _describe(version, _count_use(self._live_sequences()), self._times.since_1970())
        self._outbox.to_front.append(
            AdapterReply(
                call,
                loaded={name: one.path for name, one in self._names.items()},
                error=error,
                lora_version=version.id if version else NO_VERSION,
                replaced=replaced.id if replaced else NO_VERSION,
                adapter=state,
            )
        )
