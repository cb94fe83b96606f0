"""What the front asks about adapters: load, update, unload; and what time does to them by itself.

An unload takes the name away at once. What still uses the adapter goes on until it ends or until the call's `drain_s` is
over. An adapter with a `ttl_s` is unloaded when none of its requests has run or waited for so long. A pin does not stop
that: a pin keeps weights in device memory as long as there is a name, a ttl says how long there is one.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable

import msgspec

from manylora.runtime.config import LoRAArgs
from manylora.runtime.errors import AdapterUnloadedError, ErrorInfo, ManyloraError
from manylora.runtime.messages import LoadAdapter, UnloadAdapter, UpdateAdapter
from manylora.scheduler.adapter_calls import check_load, check_requested, check_unload, check_update
from manylora.scheduler.adapter_limits import FitChecker
from manylora.scheduler.adapter_record import AdapterRecord
from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.sequence import Sequence
from manylora.scheduler.times import Times
from manylora.scheduler.unloads import Unload
from manylora.scheduler.version import Version

logger = logging.getLogger(__name__)


class AdapterAdmin:
    """`live_sequences` and `end_sequences`: see AdapterTable."""

    def __init__(
        self,
        args: LoRAArgs,
        table: AdapterTable,
        *,
        fit: FitChecker,
        times: Times,
        live_sequences: Callable[[], Iterable[Sequence]],
        end_sequences: Callable[[list[Sequence], ErrorInfo], None],
    ) -> None:
        self._enabled = args.enable_lora or bool(args.lora_paths)
        self._max_pinned = args.max_loras_per_batch - 1
        self._table = table
        self._fit = fit
        self._times = times
        self._live_sequences = live_sequences
        self._end_sequences = end_sequences

    def check_requested(self, names: set[str]) -> None:
        """Raise unless every name stands for a version now."""
        check_requested(names, self._table.names, enabled=self._enabled)

    def keep(self, names: set[str]) -> None:
        """A call will use these, if they are there then: until `let_go` their time does not run out."""
        self._table.awaited.update(names)
        self._tell_awaited(names)

    def let_go(self, names: set[str]) -> None:
        """The call waits no longer."""
        self._table.awaited -= Counter(names)
        for record in self._tell_awaited(names):
            record.idle_since = self._times.now()
            self._table.unloads.watch(record)

    def _tell_awaited(self, names: set[str]) -> list[AdapterRecord]:
        records = {name: self._table.names[name].record for name in names & self._table.names.keys()}
        for name, record in records.items():
            record.awaited = self._table.awaited[name]
        return list(records.values())

    # ---- calls --------------------------------------------------------------------------------------------------

    def on_load(self, call: LoadAdapter) -> None:
        try:
            check_load(
                call, self._table.names, self._loading(), enabled=self._enabled, max_pinned=self._max_pinned
            )
        except ManyloraError as error:
            self._table.teller.reply(call.call, error.info())
            return
        self._table.start_load(call)

    def on_update(self, call: UpdateAdapter) -> None:
        try:
            version = self._update(call)
        except ManyloraError as error:
            self._table.teller.reply(call.call, error.info())
            return
        self._table.teller.reply(call.call, None, version)

    def on_unload(self, call: UnloadAdapter) -> None:
        table = self._table
        try:
            going = table.unloads.going(call.lora_name)
            version = check_unload(call, table.names, self._loading(), going, enabled=self._enabled)
        except ManyloraError as error:
            table.teller.reply(call.call, error.info())
            return
        deadline = math.inf if call.drain_s is None else self._times.now() + call.drain_s
        self._unload(Unload(call.call, version, deadline))

    # ---- time ---------------------------------------------------------------------------------------------------

    @property
    def seconds_to_due(self) -> float | None:
        """How long `on_time` can have nothing to do; None: until something else happens."""
        due = self._table.unloads.due
        return None if due == math.inf else max(0.0, due - self._times.now())

    def on_time(self) -> bool:
        """End what an unload no longer waits for, and unload what nobody has used for its time. True if it was time."""
        table, now = self._table, self._times.now()
        if now < table.unloads.due:  # infinite where nothing has a time
            return False
        for record in table.unloads.take_overdue(now):
            self._end_users(record)
        # A name that is being replaced stays; the end of the load sets its time anew.
        idle = table.unloads.look(now, [v for name, v in table.names.items() if name not in table.loads])
        for version in idle:
            if version.named:  # unloading one looks at the time again, and may have taken this one with it
                logger.info(
                    "LoRA adapter %s was not used for its ttl_s of %g s", version.name, version.record.ttl_s
                )
                self._unload(Unload(None, version, math.inf))
        return True

    # ---- what is done -------------------------------------------------------------------------------------------

    def _update(self, call: UpdateAdapter) -> Version:
        """The version as changed. Raises, with nothing changed, if one of the changes cannot be."""
        table = self._table
        version = check_update(
            call, table.names, self._loading(), enabled=self._enabled, max_pinned=self._max_pinned
        )
        if call.pinned and not version.pinned:
            self._fit.check_pin(version, table.versions.values(), self._live_sequences())
        if call.pinned is not None:
            table.set_pin(version, call.pinned)
            table.settle(version)  # what is pinned no longer may make room for a load that waits
        if call.ttl_s is not msgspec.UNSET:
            version.record.ttl_s = call.ttl_s
            table.unloads.watch(version.record)
        return version

    def _unload(self, unload: Unload) -> None:
        """Take the name away, unless an earlier unload did."""
        table, version = self._table, unload.version
        table.unloads.add(unload)
        if version.named:
            del table.names[version.name]
            table.retire(version)
        self.on_time()

    def _end_users(self, record: AdapterRecord) -> None:
        users = [s for s in self._live_sequences() if s.version is not None and s.version.record is record]
        if users and (version := users[0].version) is not None:
            logger.info("LoRA adapter %s: its unload ends %d sequences", version.name, len(users))
            message = f"LoRA adapter {version.name} was unloaded before the request could end."
            self._end_sequences(users, AdapterUnloadedError(message, param="lora_path").info())

    def _loading(self) -> dict[str, LoadAdapter]:
        return {name: load.call for name, load in self._table.loads.items()}
