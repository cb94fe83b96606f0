"""Calls that wait for their grammars: accepted only when every grammar of the call is known to be good.

A grammar is compiled once and remembered, as is the error of a malformed one. That one took too long is not: it may have
been the machine.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from manylora.runtime.errors import BadGrammarError, ErrorInfo, QueueFullError
from manylora.runtime.messages import Submit
from manylora.scheduler.grammar import Compiled, CompileJob, Grammar, GrammarSource, source_of
from manylora.scheduler.outbox import Outbox

MAX_REMEMBERED = 32  # grammars; a large one takes megabytes
MAX_COMPILING = 128  # grammars, whether or not their callers are still there; one call alone may have more

Grammars = dict[GrammarSource, Grammar]


@dataclass(slots=True)
class ParkedCall:
    """`grammars`: those compiled so far of `wanted`; `aborted`: handles that nobody waits for
    any more; `arrived_at`: by the scheduler's clock."""

    call: Submit
    arrived_at: float
    wanted: set[GrammarSource]
    grammars: Grammars
    error: ErrorInfo | None = None
    aborted: set[int] = field(default_factory=set[int])

    @property
    def ready(self) -> bool:
        return self.error is not None or self.wanted == self.grammars.keys()

    @property
    def adapters(self) -> set[str]:
        return {name for request in self.call.requests if (name := request.lora_name) is not None}

    @property
    def num_sequences(self) -> int:
        return sum(request.params.n for request in self.call.requests)

    def add(self, compiled: Compiled) -> None:
        if isinstance(compiled.outcome, Grammar):
            self.grammars[compiled.source] = compiled.outcome
        else:
            param = f"sampling_params.{compiled.source.kind}"
            error = compiled.outcome
            self.error = self.error or ErrorInfo(error.code, error.message, error.status, param)


class GrammarDesk:
    """`keep` and `let_go` are told of the adapters that parked calls will use, see AdapterAdmin."""

    def __init__(
        self,
        outbox: Outbox,
        max_queued: int,
        clock: Callable[[], float],
        *,
        keep: Callable[[set[str]], None],
        let_go: Callable[[set[str]], None],
    ) -> None:
        self._outbox = outbox
        self._keep, self._let_go = keep, let_go
        self._max_queued = max_queued
        self._clock = clock
        self._remembered: OrderedDict[GrammarSource, Compiled] = OrderedDict()
        self._compiling: set[GrammarSource] = set()
        self._parked: list[ParkedCall] = []

    @property
    def busy(self) -> bool:
        return bool(self._parked)

    def kept(self) -> Iterator[str]:
        """The adapters that parked calls will use, each as often as one does."""
        for parked in self._parked:
            yield from parked.adapters

    def take(self, call: Submit) -> ParkedCall | None:
        """The call with its grammars if all are known (or one is known to be bad); else it is parked until they are.

        Raises QueueFullError if too much is parked.
        """
        wanted = {source for r in call.requests if (source := source_of(r.params)) is not None}
        parked = ParkedCall(call, self._clock(), wanted, {})
        for source in parked.wanted:
            if (known := self._remembered.get(source)) is not None:
                self._remembered.move_to_end(source)
                parked.add(known)
        if parked.ready:
            return parked
        waiting = sum(other.num_sequences for other in self._parked)
        if waiting + parked.num_sequences > self._max_queued:
            raise QueueFullError(
                f"{waiting} sequences wait for their grammars; {parked.num_sequences} more exceed the limit of "
                f"{self._max_queued}."
            )
        missing = parked.wanted - parked.grammars.keys() - self._compiling
        if self._compiling and len(self._compiling) + len(missing) > MAX_COMPILING:
            raise QueueFullError(
                f"{len(self._compiling)} grammars wait to be compiled; {len(missing)} more exceed the limit of {MAX_COMPILING}."
            )
        self._keep(parked.adapters)
        self._parked.append(parked)
        self._compiling |= missing
        self._outbox.to_grammars += [CompileJob(source) for source in sorted(missing)]
        return None

    def on_compiled(self, compiled: Compiled) -> list[ParkedCall]:
        """The calls that wait no longer, in the order they came."""
        self._compiling.discard(compiled.source)
        outcome = compiled.outcome
        if isinstance(outcome, Grammar) or outcome.code == BadGrammarError.code:
            self._remembered[compiled.source] = compiled
        if len(self._remembered) > MAX_REMEMBERED:
            self._remembered.popitem(last=False)
        for parked in self._parked:
            if compiled.source in parked.wanted:
                parked.add(compiled)
        return self._unpark(lambda parked: parked.ready)

    def abort(self, handle: int) -> None:
        """Nobody waits for this sequence any more, if it is one of a parked call. A call of which nobody waits for any is
        forgotten.
        """
        for parked in self._parked:
            if any(r.handle <= handle < r.handle + r.params.n for r in parked.call.requests):
                parked.aborted.add(handle)
        self._unpark(lambda parked: len(parked.aborted) == parked.num_sequences)

    def _unpark(self, over: Callable[[ParkedCall], bool]) -> list[ParkedCall]:
        """Take out, and return, the calls whose wait is over."""
        gone = [parked for parked in self._parked if over(parked)]
        self._parked = [parked for parked in self._parked if not over(parked)]
        for parked in gone:
            self._let_go(parked.adapters)
        return gone
