"""A scheduler with a fake front, loader and worker around it: everything that a test does to it, one event a call."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from manylora.lora.page_layout import pool_geometry
from manylora.runtime.config import CacheArgs, LoRAArgs, ModelArgs, ParallelArgs, ScheduleArgs, ServerConfig
from manylora.runtime.errors import AdapterChangedError, AdapterRejectedError, WorkerCrashedError
from manylora.runtime.messages import (
    Abort,
    AdapterImage,
    Done,
    FlushCache,
    GenerateReq,
    GetState,
    LoadAdapter,
    LoadFailed,
    LoadJob,
    Rejected,
    State,
    Submit,
    UnloadAdapter,
    UpdateAdapter,
    pack_i32,
    pack_i64,
)
from manylora.runtime.model_config import ModelConfig, parse_model_config
from manylora.runtime.sampling_params import SamplingParams
from manylora.scheduler.grammar import GrammarJob
from manylora.scheduler.scheduler import PoolLimits, Scheduler
from tests.scheduler import fake_grammar
from tests.scheduler.fake_front import EOS, Call, Expected, FakeFront
from tests.scheduler.fake_worker import VOCAB, FakeWorker

EPOCH = 1_700_000_000.0  # what the world's clock shows when `World.now` is 0
FAILURE = WorkerCrashedError("a rank failed").info()


def tiny_model() -> ModelConfig:
    return parse_model_config(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": VOCAB,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 4096,
            "torch_dtype": "float32",
            "eos_token_id": EOS,
        }
    )


@dataclass
class Adapter:
    """What lies at a path: `num_pages` and `num_slices` when laid out; `edition` changes with the files."""

    num_pages: int = 1
    num_slices: int = 1
    edition: int = 0


@dataclass
class World:
    page_size: int = 4
    num_pages: int = 24
    num_host_pages: int = 8
    num_slices: int = 8
    max_loras: int = 2
    max_loaded: int | None = None
    max_running: int = 6
    max_queued: int = 64
    chunk: int = 16
    tp_size: int = 2
    overlap: bool = True
    radix: bool = True
    max_total_tokens: int | None = None
    enable_lora: bool = True
    context: int | None = None
    files: dict[str, Adapter] = field(default_factory=dict)
    now: float = 0.0  # of both clocks

    def __post_init__(self) -> None:
        config = ServerConfig(
            model=ModelArgs(model_path="tiny", context_length=self.context),
            lora=LoRAArgs(
                enable_lora=self.enable_lora,
                max_loras_per_batch=self.max_loras,
                max_loaded_loras=self.max_loaded,
            ),
            cache=CacheArgs(
                page_size=self.page_size,
                disable_radix_cache=not self.radix,
                max_total_tokens=self.max_total_tokens,
            ),
            schedule=ScheduleArgs(
                max_running_requests=self.max_running,
                max_queued_requests=self.max_queued,
                chunked_prefill_size=self.chunk,
                disable_overlap_schedule=not self.overlap,
            ),
            parallel=ParallelArgs(tp_size=self.tp_size),
        )
        model = tiny_model()
        geometry = pool_geometry(
            model, tp_size=self.tp_size, sharding="slora", page_size=self.page_size, itemsize=4
        )
        limits = PoolLimits(self.num_pages, self.num_host_pages, self.num_slices)
        self.scheduler = Scheduler(
            config,
            model,
            geometry,
            limits,
            clock=lambda: self.now,
            world_clock=lambda: EPOCH + self.now,
            seed=1,
        )
        self.worker = FakeWorker(
            num_pages=self.num_pages,
            page_size=self.page_size,
            tp_size=self.tp_size,
            max_tokens=self.chunk,
            max_adapters=self.max_loras,
        )
        self.jobs: list[LoadJob] = []
        self.grammar_jobs: list[GrammarJob] = []
        self.decided: set[int] = set()  # handles of requests that wait no more for their grammars
        # By record (see FakeFront): requests accepted, and those whose adapter was resident then.
        self.requests: Counter[int] = Counter()
        self.hits: Counter[int] = Counter()
        self.images: set[str] = set()  # not released yet
        self.copies: Counter[int] = Counter()  # those that every rank has done, by version
        self.failed_copies: set[int] = set()  # of those under way
        self.front = FakeFront()
        self.sequences = self.front.sequences
        self.calls = self.front.calls
        self.names = self.front.names
        self.next_handle = 1
        self.next_call = 1

    # ---- the front ----------------------------------------------------------------------------------------------

    def submit(
        self,
        prompt: list[int],
        *,
        lora: str | None = None,
        max_new: int = 4,
        num_top: int = -1,
        logprob_start_len: int = -1,
        **params: Any,
    ) -> list[Expected]:
        """One call of one request; its sequences."""
        return self.submit_all([(prompt, lora, max_new, num_top, logprob_start_len, params)])

    def submit_all(
        self, entries: list[tuple[list[int], str | None, int, int, int, dict[str, Any]]]
    ) -> list[Expected]:
        requests: list[GenerateReq] = []
        made: list[Expected] = []
        for prompt, lora, max_new, num_top, start_len, params in entries:
            sampling = SamplingParams(max_new_tokens=max_new, **{"temperature": 0.0, **params})
            request = GenerateReq(self.next_handle, pack_i32(prompt), sampling, lora, num_top, start_len)
            requests.append(request)
            self.next_handle += sampling.n
            for sample in range(sampling.n):
                made.append(Expected(request, sample, list(prompt)))
                self.sequences[request.handle + sample] = made[-1]
        names, tiers = self._names_and_tiers()
        self.scheduler.on_front(Submit(requests))
        self._deliver()
        self._bind_decided(names, tiers)
        return made

    def _names_and_tiers(self) -> tuple[dict[str, int], dict[str, str]]:
        return dict(self.names), {adapter.lora_name: adapter.tier for adapter in self.state().adapters}

    def _bind_decided(self, names: dict[str, int], tiers: dict[str, str]) -> None:
        """A request is accepted, and its adapter's name looked up, once its call waits for no grammar."""
        parked = self._parked_handles()
        for sequence in self.sequences.values():
            request = sequence.request
            if request.handle in self.decided | parked or isinstance(sequence.finish, Rejected):
                continue
            name = request.lora_name
            sequence.bound_to = 0 if name is None else names[name]
            if name is not None and not sequence.sample:
                record = self.front.records[names[name]]
                self.requests[record] += 1
                self.hits[record] += tiers[name] == "resident"
        self._note_decided()

    def _note_decided(self) -> None:
        self.decided = {s.request.handle for s in self.sequences.values()} - self._parked_handles()

    def _parked_handles(self) -> set[int]:
        return {r.handle for call in self.scheduler._grammars._parked for r in call.call.requests}

    def abort(self, *sequences: Expected) -> None:
        handles = [s.request.handle + s.sample for s in sequences]
        self.scheduler.on_front(Abort(pack_i64(handles)))
        for sequence in sequences:
            sequence.aborted = sequence.aborted or sequence.finish is None
        self._deliver()
        self._note_decided()  # a call that nobody waits for any more is never accepted

    def load(
        self,
        name: str,
        path: str,
        *,
        pinned: bool = False,
        replace: bool = False,
        if_version: int | None = None,
        ttl_s: float | None = None,
    ) -> Call:
        """Ask for a load; nothing more happens until the loader works."""
        self.files.setdefault(path, Adapter())
        call = self._call("load", name)
        call.if_version = if_version
        number = self.next_call - 1
        self.scheduler.on_front(LoadAdapter(number, name, path, pinned, replace, if_version, ttl_s))
        self._deliver()
        return call

    def load_now(self, name: str, path: str, **flags: Any) -> Call:
        call = self.load(name, path, **flags)
        self.settle()
        assert call.answered
        return call

    def unload(self, name: str, *, drain_s: float | None = None, if_version: int | None = None) -> Call:
        call = self._call("unload", name)
        self.scheduler.on_front(UnloadAdapter(self.next_call - 1, name, drain_s, if_version))
        self._deliver()
        self._forget_gone()
        return call

    def update(self, name: str, **changes: Any) -> Call:
        call = self._call("update", name)
        self.scheduler.on_front(UpdateAdapter(self.next_call - 1, name, **changes))
        self._deliver()
        return call

    def flush(self) -> Done:
        call = self._call("flush", "")
        self.scheduler.on_front(FlushCache(self.next_call - 1))
        self._deliver()
        return call.reply

    def state(self) -> State:
        call = self._call("state", "")
        self.scheduler.on_front(GetState(self.next_call - 1))
        self._deliver()
        return call.reply

    def _call(self, kind: str, name: str) -> Call:
        call = self.calls[self.next_call] = Call(kind, name)
        self.next_call += 1
        return call

    # ---- the loader ---------------------------------------------------------------------------------------------

    def finish_job(self, index: int = 0, *, fail: bool = False, careless: bool = False) -> None:
        """The loader ends a job: with an image; with a failure; a careless one does not compare digests."""
        job = self.jobs.pop(index)
        adapter = self.files[job.lora_path]
        digest = f"{job.lora_path}@{adapter.edition}"
        if fail:
            error = AdapterRejectedError("the disk is gone").info()
            self.scheduler.on_loader(LoadFailed(job.job, error))
        elif job.digest not in ("", digest) and not careless:
            self.scheduler.on_loader(LoadFailed(job.job, AdapterChangedError("changed").info()))
        else:
            path = f"{digest}#{job.job}"
            self.images.add(path)
            ranks = ((4,) * 7,)
            scalings = ((1.0,) * 7,)
            self.scheduler.on_loader(
                AdapterImage(
                    job.job,
                    path,
                    digest,
                    ranks,
                    scalings,
                    adapter.num_pages,
                    adapter.num_slices,
                    revision=f"r{adapter.edition}",
                    num_bytes=100 * adapter.num_pages,
                )
            )
        self._deliver()

    def lose_loader(self) -> None:
        self.jobs.clear()
        self.scheduler.loader_lost()
        self._deliver()

    # ---- grammars -----------------------------------------------------------------------------------------------

    def finish_grammar_job(self, index: int = 0, *, fail: bool = False) -> None:
        """A grammar is compiled, or a mask computed."""
        job = self.grammar_jobs.pop(index)
        names, tiers = self._names_and_tiers()
        self.scheduler.on_grammar(fake_grammar.do(job, fail=fail))
        self._deliver()
        self._bind_decided(names, tiers)

    # ---- the workers --------------------------------------------------------------------------------------------

    def acks(self) -> list[tuple[str, int, int]]:
        """(kind, version, rank) of every acknowledgement that is due."""
        kinds = (("stage", self.worker.stagings), ("copy", self.worker.copyings))
        return [
            (kind, version, rank)
            for kind, due in kinds
            for version, ranks in sorted(due.items())
            for rank in sorted(ranks)
        ]

    def ack(self, index: int = 0, *, fail: bool = False) -> None:
        kind, version, rank = self.acks()[index]
        if kind == "copy":
            self.failed_copies |= {version} if fail else set()
        answer = self.worker.answer_staging if kind == "stage" else self.worker.answer_copying
        self.scheduler.on_worker(answer(version, rank, FAILURE if fail else None))
        if kind == "copy" and version not in self.worker.copyings:
            self.copies[version] += version not in self.failed_copies
            self.failed_copies.discard(version)
        self._deliver()

    def complete_step(self) -> None:
        """Deliver the oldest step's answer."""
        self.scheduler.on_worker(self.worker.flights.popleft().output)
        self._deliver()

    # ---- time ---------------------------------------------------------------------------------------------------

    def schedule(self) -> None:
        self.scheduler.schedule()
        self._deliver()

    def step(self) -> None:
        """Plan, then complete one step."""
        self.schedule()
        if self.worker.flights:
            self.complete_step()

    def settle(self, limit: int = 20000) -> None:
        """Let everything under way end."""
        for _ in range(limit):
            self.schedule()
            if self.scheduler.idle:
                self.scheduler.check()
                return
            while self.jobs:
                self.finish_job()
            while self.acks():
                self.ack()
            while self.grammar_jobs:
                self.finish_grammar_job()
            if self.worker.flights:
                self.complete_step()
        raise AssertionError("no progress")

    def run(self, *sequences: Expected) -> list[list[int]]:
        """Until all is done; the tokens generated."""
        self.settle()
        return [s.tokens[len(s.tokens) - s.generated :] for s in sequences]

    def pass_time(self, seconds: float) -> None:
        self.now += seconds
        self.scheduler.on_time()
        self._deliver()
        self._forget_gone()

    def _forget_gone(self) -> None:
        """Names that were unloaded, or whose time was over."""
        loaded = {adapter.lora_name for adapter in self.state().adapters}
        for name in self.names.keys() - loaded:
            del self.names[name]

    # ---- what the scheduler says --------------------------------------------------------------------------------

    def _deliver(self) -> None:
        scheduler = self.scheduler
        for message in scheduler.to_workers:
            self.worker.receive(message)
        for job in scheduler.to_loader:
            assert isinstance(job, LoadJob)
            self.jobs.append(job)
        self.grammar_jobs += scheduler.to_grammars
        scheduler.to_grammars.clear()
        for path in scheduler.released_images:
            self.images.remove(path)
        messages = list(scheduler.to_front)
        for outbox in (
            scheduler.to_workers,
            scheduler.to_loader,
            scheduler.released_images,
            scheduler.to_front,
        ):
            outbox.clear()
        for message in messages:
            self.front.on_message(message, self.worker.digests)

    # ---- at the end ---------------------------------------------------------------------------------------------

    def assert_nothing_left(self) -> None:
        """Every sequence and call has ended; with the cache flushed and all unloaded, all memory is free."""
        for sequence in self.sequences.values():
            assert sequence.ended
        self.pass_time(0.0)
        for name in list(self.names):
            assert self.unload(name).reply.error is None
        assert self.flush().error is None
        self.settle()
        assert all(call.answered for call in self.calls.values())
        state = self.state()
        assert state.pages_free == state.pages_total == self.num_pages
        assert state.host_pages_free == self.num_host_pages
        assert state.slices_free == self.num_slices
        assert (state.running, state.waiting, state.leases, state.live_versions) == (0, 0, 0, 0)
        assert not self.images
        assert not self.worker.staged
        assert not self.worker.host_pages
