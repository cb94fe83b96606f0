"""Names that are going: unloads that wait for their last sequence, and adapters whose time without use runs out.

An unload is of everything that its name has stood for since it was loaded: the version it stands for, and those replaced
before that still run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from manylora.scheduler.adapter_record import AdapterRecord
from manylora.scheduler.version import Version


@dataclass(slots=True, eq=False)
class Unload:
    """`version`: the last one of its name; `call`: who is to be answered, None after an expiry."""

    call: int | None
    version: Version
    deadline: float  # by the scheduler's clock; then what still uses it is ended

    @property
    def record(self) -> AdapterRecord:
        return self.version.record


class Unloads:
    """`due` is never later than the next deadline or expiry, so that nothing need be looked at before."""

    def __init__(self) -> None:
        self.due = math.inf
        self._pending: list[Unload] = []

    def add(self, unload: Unload) -> None:
        self._pending.append(unload)
        self.due = min(self.due, unload.deadline)

    def going(self, name: str) -> Version | None:
        """The version that `name` stood for last, if its unload is not done."""
        return next((one.version for one in reversed(self._pending) if one.version.name == name), None)

    def watch(self, record: AdapterRecord) -> None:
        """Its record has changed: look at it in time."""
        if (expires_at := record.expires_at) is not None:
            self.due = min(self.due, expires_at)

    def take_done(self, versions: Iterable[Version]) -> list[Unload]:
        """Those of whose adapter nothing lives; `versions`: all that do."""
        if not self._pending:
            return []
        alive = {version.record for version in versions}
        done = [unload for unload in self._pending if unload.record not in alive]
        self._pending = [unload for unload in self._pending if unload.record in alive]
        return done

    def take_overdue(self, now: float) -> list[AdapterRecord]:
        """The records whose last sequences are to be ended now, each told once."""
        overdue = [unload for unload in self._pending if unload.deadline <= now]
        for unload in overdue:
            unload.deadline = math.inf
        return [unload.record for unload in overdue]

    def look(self, now: float, loaded: Iterable[Version]) -> list[Version]:
        """The versions that have been idle for their time; `due` is the next moment from now on."""
        expired: list[Version] = []
        self.due = min((unload.deadline for unload in self._pending), default=math.inf)
        for version in loaded:
            expires_at = version.record.expires_at
            if expires_at is not None and expires_at <= now:
                expired.append(version)
            else:
                self.watch(version.record)
        return expired
