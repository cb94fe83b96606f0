"""The owner of all state, as one object without sockets: messages in, decisions, messages out.

`process.py` hands it every message and sends what the outboxes hold. Nothing here waits, reads a file or knows text.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable

from manylora.lora.page_layout import PoolGeometry
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import (
    BusyError,
    ErrorInfo,
    ManyloraError,
    ProtocolError,
)
from manylora.runtime.messages import (
    Abort,
    AdapterCopied,
    AdapterImage,
    AdapterStaged,
    Done,
    FlushCache,
    FrontToScheduler,
    GetState,
    LoadAdapter,
    LoadFailed,
    Rejected,
    StepOutput,
    Submit,
    UnloadAdapter,
    UpdateAdapter,
    pack_i64,
    unpack_i64,
)
from manylora.runtime.model_config import ModelConfig
from manylora.runtime.plan import ForwardOutput
from manylora.scheduler.adapter_admin import AdapterAdmin
from manylora.scheduler.adapter_limits import FitChecker
from manylora.scheduler.adapter_table import AdapterTable
from manylora.scheduler.admission import Admission
from manylora.scheduler.device_tier import DeviceTier
from manylora.scheduler.grammar import Compiled, GrammarAnswer
from manylora.scheduler.grammar_desk import GrammarDesk, ParkedCall
from manylora.scheduler.host_tier import HostTier
from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.intake import Intake
from manylora.scheduler.ledger import Ledger
from manylora.scheduler.memory import Memory, PoolLimits
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.outputs import OutputReader, finish_error
from manylora.scheduler.planner import Planner
from manylora.scheduler.progress import Progress
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import Sequence
from manylora.scheduler.sequence_memory import SequenceMemory
from manylora.scheduler.step import StepRecord
from manylora.scheduler.times import Times

__all__ = ["PoolLimits", "Scheduler"]

OVERLAP_DEPTH = 2  # steps in flight


class Scheduler:
    """Decides for one engine. `limits` are the smallest of all ranks; `seed` draws the seeds of requests without one.

    `to_front`, `to_workers`, `to_loader`, `to_grammars` (jobs to be done beside the step loop) and `released_images` (files
    to unlink) are emptied by the caller after each call. Every rank gets `to_workers` in order; messages to the front may be sent at once.
    """

    def __init__(
        self,
        config: ServerConfig,
        model: ModelConfig,
        geometry: PoolGeometry,
        limits: PoolLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
        world_clock: Callable[[], float] = time.time,
        seed: int,
    ) -> None:
        outbox = Outbox()
        self.to_front = outbox.to_front
        self.to_workers = outbox.to_workers
        self.to_loader = outbox.to_loader
        self.to_grammars = outbox.to_grammars
        self.released_images = outbox.released_images
        schedule, lora, tp_size = config.schedule, config.lora, config.parallel.tp_size
        chunk_size, page_size = schedule.chunked_prefill_size, geometry.page_size
        self._depth = 1 if schedule.disable_overlap_schedule else OVERLAP_DEPTH
        self._in_flight: deque[StepRecord] = deque()
        self._steps = StepClock()
        self._progress = Progress(clock)
        self._memory = Memory(
            limits, page_size=page_size, max_total_tokens=config.cache.max_total_tokens, clock=self._steps
        )
        fit = FitChecker(limits, page_size=page_size, max_kv_pages=self._memory.max_kv_pages)
        host = HostTier(limits.num_host_pages, lora.max_loaded_loras, tp_size, outbox)
        device = DeviceTier(self._memory, tp_size, outbox)
        times = Times(clock, world_clock)
        self._adapters = AdapterTable(
            host=host,
            device=device,
            tree=self._memory.tree,
            fit=fit,
            clock=self._steps,
            times=times,
            outbox=outbox,
            live_sequences=self._live_sequences,
            end_sequences=self._end_sequences,
        )
        self._admin = AdapterAdmin(
            lora,
            self._adapters,
            fit=fit,
            times=times,
            live_sequences=self._live_sequences,
            end_sequences=self._end_sequences,
        )
        self._grammars = GrammarDesk(
            outbox, schedule.max_queued_requests, clock, keep=self._admin.keep, let_go=self._admin.let_go
        )
        sequences = SequenceMemory(self._memory)
        # A step holds a row of each running sequence, so no more may run than a step has tokens.
        num_slots = min(schedule.max_running_requests, chunk_size)
        self._roster = Roster(num_slots, sequences, self._adapters, clock)
        self._intake = Intake(
            self._roster,
            self._adapters,
            self._admin,
            fit,
            context_length=config.model.context_length or model.max_position_embeddings,
            eos_ids=model.eos_token_ids,
            max_queued=schedule.max_queued_requests,
            shares_prefixes=not config.cache.disable_radix_cache,
            seed=seed,
        )
        admission = Admission(
            self._roster,
            self._adapters,
            device,
            sequences,
            max_adapters=lora.max_loras_per_batch,
            chunk_size=chunk_size,
        )
        self._planner = Planner(
            self._roster, admission, sequences, token_budget=chunk_size, vocab_size=model.vocab_size
        )
        self._outputs = OutputReader(self._roster, sequences, page_size, outbox)
        self._ledger = Ledger(self._roster, self._adapters, self._memory, host, self._steps, self._grammars)

    # ---- messages in --------------------------------------------------------------------------------------------

    def on_front(self, message: FrontToScheduler) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                for handle in unpack_i64(message.handles):
                    if sequence := self._roster.live.get(handle):
                        self._roster.end(sequence)
                    else:
                        self._grammars.abort(handle)
            case LoadAdapter():
                self._admin.on_load(message)
            case UpdateAdapter():
                self._admin.on_update(message)
                self._roster.changed = True
            case UnloadAdapter():
                self._admin.on_unload(message)
                self._roster.changed = True
            case FlushCache():
                self._flush(message)
            case GetState():
                self.to_front.append(self._ledger.state(message.call))

    def on_loader(self, message: AdapterImage | LoadFailed) -> None:
        if isinstance(message, AdapterImage):
            self._adapters.on_image(message)
        else:
            self._adapters.on_load_failed(message)
        self._roster.changed = True

    def on_grammar(self, answer: GrammarAnswer) -> None:
        """A grammar is compiled, or what a sequence may draw next is known."""
        if isinstance(answer, Compiled):
            for call in self._grammars.on_compiled(answer):
                self._accept(call)
            return
        answer.constraint.mask = answer.outcome if isinstance(answer.outcome, bytes) else None
        sequence = self._roster.live.get(answer.constraint.handle)
        if sequence is not None and isinstance(answer.outcome, ErrorInfo):
            self._end_sequences([sequence], answer.outcome)
        self._roster.changed = True

    def on_worker(self, message: ForwardOutput | AdapterStaged | AdapterCopied) -> None:
        """An answer: of a step from rank 0, of an adapter command from each rank."""
        if isinstance(message, ForwardOutput):
            self._complete_step(message)
            return
        if isinstance(message, AdapterStaged):
            self._adapters.on_staged(message)
        else:
            self._adapters.on_copied(message)
        self._roster.changed = True

    def loader_lost(self) -> None:
        """The loader died: fail what waits for it. A new one starts with an empty list of jobs."""
        self._adapters.on_loader_lost()

    def images(self) -> set[str]:
        """The files of adapters' images that the workers have yet to stage."""
        return {version.image.path for version in self._adapters.versions.values() if version.image}

    # ---- time ---------------------------------------------------------------------------------------------------

    @property
    def seconds_to_due(self) -> float | None:
        """When `on_time` is to be called next if no message comes before; None: it need not."""
        return self._admin.seconds_to_due

    def on_time(self) -> None:
        """Do what is due by now. Costs nothing when nothing is."""
        if self._admin.on_time():
            self._roster.changed = True

    # ---- decisions ----------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        """Plan steps until as many are in flight as may be, or nothing can be planned."""
        while len(self._in_flight) < self._depth:
            planned = self._planner.plan(self._steps.planned + 1)
            if planned is None:
                return
            plan, record = planned
            self._steps.planned = plan.step
            self._in_flight.append(record)
            self.to_workers.append(plan)

    @property
    def idle(self) -> bool:
        """Nothing runs, waits or is under way."""
        return not (self._roster.live or self._in_flight or self._adapters.busy or self._grammars.busy)

    def check(self) -> None:
        """Recount everything from scratch; AssertionError if the books are wrong."""
        self._ledger.check()

    def _complete_step(self, output: ForwardOutput) -> None:
        if not self._in_flight or self._in_flight[0].step != output.step:
            raise ProtocolError(f"a worker answered step {output.step}, which is not the oldest in flight")
        record = self._in_flight.popleft()
        self._steps.completed = output.step
        before_replies = len(self.to_front)  # an end may let go the answer to an unload
        answer = self._outputs.read(record, output)
        if answer is not None:
            self.to_front.insert(before_replies, answer)
        self._progress.add(len(record.samples), self._roster, self._memory)

    def _submit(self, call: Submit) -> None:
        try:
            ready = self._grammars.take(call)
        except ManyloraError as error:
            self._reject(call, error.info())
            return
        if ready is not None:
            self._accept(ready)

    def _accept(self, parked: ParkedCall) -> None:
        """Queue a call whose grammars are known, or refuse it."""
        if parked.error is not None:
            self._reject(parked.call, parked.error)
            return
        try:
            self._intake.accept(parked.call.requests, parked.grammars, parked.arrived_at)
        except ManyloraError as error:
            self._reject(parked.call, error.info())
            return
        for handle in parked.aborted:
            if sequence := self._roster.live.get(handle):
                self._roster.end(sequence)

    def _reject(self, call: Submit, error: ErrorInfo) -> None:
        self.to_front.append(Rejected(pack_i64(request.handle for request in call.requests), error))

    def _flush(self, call: FlushCache) -> None:
        error = None
        if self._roster.live or self._grammars.busy:
            error = BusyError("The cache cannot be flushed while requests run or wait.").info()
        else:
            self._memory.tree.clear()
        self.to_front.append(Done(call.call, error))

    def _live_sequences(self) -> Iterable[Sequence]:
        return self._roster.live.values()

    def _end_sequences(self, sequences: list[Sequence], error: ErrorInfo) -> None:
        before_replies = len(self.to_front)  # an end may let go the answer to an unload
        for sequence in sequences:
            self._roster.end(sequence)
        if sequences:
            finishes = [finish_error(sequence.handle, error) for sequence in sequences]
            self.to_front.insert(before_replies, StepOutput(b"", b"", finishes=finishes))
