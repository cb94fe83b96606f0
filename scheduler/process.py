"""The scheduler's process: pipes in, `Scheduler` calls, pipes out. It decides nothing itself.

    python -m manylora.scheduler.process <config.json>

It binds the pipes "front", "loader" and "worker0" …; waits until every worker and the loader are ready; loads the
adapters of --lora-paths; tells the front; then sleeps in one poll over all pipes and never blocks anywhere else.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
from pathlib import Path
from typing import Any

import zmq

from manylora.lora.page_layout import pool_geometry
from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import LoRAPath, ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo, ProtocolError, RemoteError
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import (
    AdapterReply,
    FrontToScheduler,
    LoadAdapter,
    LoaderReady,
    LoaderRestarted,
    LoaderToScheduler,
    SchedulerToFront,
    SchedulerToLoader,
    SchedulerToWorker,
    ServerInfo,
    Shutdown,
    WorkerFailed,
    WorkerReady,
    WorkerToScheduler,
)
from manylora.runtime.model_config import DTYPE_BYTES, load_model_config
from manylora.scheduler.file_remover import FileRemover
from manylora.scheduler.grammar_threads import GrammarThreads
from manylora.scheduler.quiet_time import QuietTime, leave_garbage
from manylora.scheduler.scheduler import PoolLimits, Scheduler

logger = logging.getLogger("manylora.scheduler")

_START_CALL = -1  # call numbers of the front count up from 0
_VERDICT_MS = 500
_LONGEST_POLL_MS = 3_600_000
# How long a step may wait for masks, so that their rows take every second step and not every third. Most need a tenth of it,
# and the device has the step before to go on with.
_MASK_PATIENCE_S = 0.002


class SchedulerProcess:
    """Owns the pipes of one scheduler."""

    def __init__(self, config: ServerConfig, context: ChildContext) -> None:
        self._config = config
        self._context = context
        self._model = load_model_config(config.model.model_dir)
        self._supervisor = context.supervisor
        self._poller = zmq.Poller()
        self._poller.register(self._supervisor.socket, zmq.POLLIN)
        self._front: Pipe[SchedulerToFront, FrontToScheduler] = self._bind(
            "front", SchedulerToFront, FrontToScheduler
        )
        self._workers: list[Pipe[SchedulerToWorker, WorkerToScheduler]] = [
            self._bind(f"worker{rank}", SchedulerToWorker, WorkerToScheduler)
            for rank in range(config.parallel.tp_size)
        ]
        self._loader: Pipe[SchedulerToLoader, LoaderToScheduler] = self._bind_loader(0)
        self._loader_ready = False
        self._remover = FileRemover()
        # While the workers load: building its tokenizer would hold up steps.
        self._grammars = GrammarThreads(
            config.model.tokenizer_path or config.model.model_dir,
            self._model.vocab_size,
            self._model.eos_token_ids,
        )
        self._poller.register(self._grammars.fileno(), zmq.POLLIN)
        self._stopping = False
        self._start_reply: AdapterReply | None = None
        self._quiet_time = QuietTime()

    def run(self) -> None:
        """Serve until the supervisor says Shutdown. Raises what ends the engine, after an orderly end AssertionError if the
        books are wrong.
        """
        started = self._start()
        while not self._stopping:
            self._turn()
        self._close()
        if started and self._scheduler.idle:
            self._scheduler.check()

    def _close(self) -> None:
        """Let workers and loader end in order. What was sent before still leaves."""
        for pipe in (*self._workers, self._loader):
            with contextlib.suppress(ProtocolError):  # it has not come up yet
                pipe.send(Shutdown())
            pipe.close()
        self._grammars.close()
        self._front.close()
        self._context.zmq.term()

    # ---- starting -------------------------------------------------------------------------------------------------

    def _start(self) -> bool:
        """Until all are ready and everybody knows. False: told to end before there was a scheduler."""
        ready = self._await_workers()
        if self._stopping:
            return False
        self._scheduler = self._make_scheduler(ready)
        for path in self._config.lora.lora_paths:
            self._load_at_start(path)
        self._await_front()
        if not self._stopping:
            self._front.send(self._server_info(ready))
            self._context.ready()
            leave_garbage()
        return True

    def _await_workers(self) -> list[WorkerReady]:
        """What each rank has room for, once all ranks and the loader are ready."""
        ready: dict[int, WorkerReady] = {}
        while not self._stopping and not (len(ready) == len(self._workers) and self._loader_ready):
            self._poller.poll()
            self._handle_supervisor()
            self._loader_ready = self._loader_ready or LoaderReady() in self._loader.drain()
            for pipe in self._workers:
                for message in pipe.drain():
                    if isinstance(message, WorkerFailed):
                        raise RemoteError(message.error)
                    if isinstance(message, WorkerReady):
                        ready[message.tp_rank] = message
        return list(ready.values())

    def _await_front(self) -> None:
        """Until the front is connected: the end that binds cannot send before."""
        self._poller.register(self._front.socket, zmq.POLLOUT)
        while not self._stopping and self._front.socket not in dict(self._poller.poll()):
            self._handle_supervisor()
        self._poller.modify(self._front.socket, zmq.POLLIN)

    def _make_scheduler(self, ready: list[WorkerReady]) -> Scheduler:
        dtypes = {worker.dtype for worker in ready}
        if dtypes != {self._config.model.dtype}:
            raise ConfigError(f"the workers run in {sorted(dtypes)}, not in {self._config.model.dtype}")
        geometry = pool_geometry(
            self._model,
            tp_size=self._config.parallel.tp_size,
            sharding=self._config.lora.sharding,
            page_size=self._config.cache.page_size,
            itemsize=DTYPE_BYTES[self._config.model.dtype],
        )
        limits = PoolLimits(
            num_pages=min(worker.num_pages for worker in ready),
            num_host_pages=min(worker.num_host_pages for worker in ready),
            num_slices=min(worker.num_slices for worker in ready),
        )
        self._page_bytes, self._limits = geometry.page_bytes, limits
        return Scheduler(self._config, self._model, geometry, limits, seed=self._config.model.random_seed)

    def _load_at_start(self, path: LoRAPath) -> None:
        """Load one adapter of --lora-paths as the front would have it loaded. Its failure ends the launch."""
        self._start_reply = None
        self._scheduler.on_front(LoadAdapter(_START_CALL, path.lora_name, path.lora_path, path.pinned))
        self._flush()
        while self._start_reply is None and not self._stopping:
            self._turn()
        error = self._start_reply.error if self._start_reply is not None else None
        if error is not None:
            message = f"--lora-paths {path.lora_name}: {error.message}"
            raise RemoteError(ErrorInfo(error.code, message, error.status, "lora_paths"))
        logger.info("loaded adapter %s from %s", path.lora_name, path.lora_path)

    def _server_info(self, ready: list[WorkerReady]) -> ServerInfo:
        model, cache = self._config.model, self._config.cache
        capacity = self._limits.num_pages * cache.page_size
        return ServerInfo(
            model=self._model,
            dtype=model.dtype,
            device=ready[0].device,
            context_length=model.context_length or self._model.max_position_embeddings,
            max_total_tokens=min(capacity, cache.max_total_tokens or capacity),
            num_pages=self._limits.num_pages,
            page_bytes=self._page_bytes,
            num_host_pages=self._limits.num_host_pages,
            model_dir=model.model_dir,
            tokenizer_dir=model.tokenizer_path,
        )

    def _bind(self, name: str, sends: Any, receives: Any, epoch: int = 0) -> Pipe[Any, Any]:
        address = pipe_address(self._config.run_dir, name, epoch)
        pipe = Pipe[Any, Any](
            self._context.zmq, address, bind=True, sends=sends, receives=receives, epoch=epoch
        )
        if name != "front":  # whose requests wait in the pipe until the engine is ready
            self._poller.register(pipe.socket, zmq.POLLIN)
        return pipe

    def _bind_loader(self, epoch: int) -> Pipe[SchedulerToLoader, LoaderToScheduler]:
        return self._bind("loader", SchedulerToLoader, LoaderToScheduler, epoch)

    # ---- serving --------------------------------------------------------------------------------------------------

    def _turn(self) -> None:
        """Sleep until a message is here, handle all that are, plan what they allow, send what came of it."""
        scheduler = self._scheduler
        due = (scheduler.seconds_to_due, self._quiet_time.seconds_to_due)
        ready = dict(self._poller.poll(milliseconds_to_first(*due)))
        if self._supervisor.socket in ready:
            self._handle_supervisor()
        if self._stopping:  # the front listens no longer
            return
        for pipe in self._workers:
            if pipe.socket in ready:
                for message in pipe.drain():
                    if isinstance(message, WorkerFailed):
                        raise RemoteError(message.error)
                    assert not isinstance(message, WorkerReady)
                    scheduler.on_worker(message)
        if self._loader.socket in ready:
            for message in self._loader.drain():
                if isinstance(message, LoaderReady):
                    self._loader_ready = True
                else:
                    scheduler.on_loader(message)
        if self._front.socket in ready:
            for message in self._front.drain():
                scheduler.on_front(message)
        scheduler.on_time()
        self._exchange_masks()
        scheduler.schedule()
        self._flush()
        self._quiet_time.use(scheduler)

    def _exchange_masks(self) -> None:
        scheduler, grammars = self._scheduler, self._grammars
        if not scheduler.to_grammars and not grammars.started:
            return
        # For a slow one once, not in every step.
        patience = _MASK_PATIENCE_S if scheduler.to_grammars else 0.0
        grammars.submit(scheduler.to_grammars)
        scheduler.to_grammars.clear()
        for answer in grammars.take(patience):
            scheduler.on_grammar(answer)

    def _flush(self) -> None:
        """Send what the scheduler has to say: first to the workers, who have the longest way to go."""
        scheduler = self._scheduler
        for message in scheduler.to_workers:
            body = self._workers[0].encode(message)
            for pipe in self._workers:
                pipe.send_encoded(body)
        scheduler.to_workers.clear()
        for message in scheduler.to_front:
            if isinstance(message, AdapterReply) and message.call == _START_CALL:
                self._start_reply = message
            else:
                self._front.send(message)
        scheduler.to_front.clear()
        if self._loader_ready:
            for message in scheduler.to_loader:
                with contextlib.suppress(
                    ProtocolError
                ):  # it just died: `loader_lost` is about to fail the job
                    self._loader.send(message)
            scheduler.to_loader.clear()
        self._remover.remove(scheduler.released_images)
        scheduler.released_images.clear()

    def _handle_supervisor(self) -> None:
        for message in self._supervisor.drain():
            if isinstance(message, Shutdown):
                self._stopping = True
            elif isinstance(message, LoaderRestarted):
                self._replace_loader(message.epoch)

    def _replace_loader(self, epoch: int) -> None:
        """Take what the dead loader had finished, forget what it had not, and wait for the next one."""
        for message in self._loader.drain():
            if not isinstance(message, LoaderReady):
                self._scheduler.on_loader(message)
        self._poller.unregister(self._loader.socket)
        self._loader.close()
        self._loader = self._bind_loader(epoch)
        self._loader_ready = False  # until then jobs wait in the outbox
        self._scheduler.to_loader.clear()
        self._scheduler.loader_lost()
        wanted = self._scheduler.images()
        for path in Path(self._config.shm_dir).iterdir():  # half an image is memory that nobody would free
            if str(path) not in wanted:
                path.unlink(missing_ok=True)  # the remover may be at it


def milliseconds_to_first(*due: float | None) -> int | None:
    """How long to poll until the first is due, given seconds, None for never: rounded up, so that it is time when it ends; and
    no longer than fits a C integer.
    """
    seconds = min((moment for moment in due if moment is not None), default=None)
    return None if seconds is None else min(_LONGEST_POLL_MS, math.ceil(seconds * 1000))


def main(config: ServerConfig, context: ChildContext) -> None:
    try:
        SchedulerProcess(config, context).run()
    except ProtocolError:
        # A peer that dies breaks its pipe. The supervisor knows what it died of and ends us before the time is over.
        if context.supervisor.wait(_VERDICT_MS):
            return
        raise


if __name__ == "__main__":
    run_child("scheduler", sys.argv[1:], main)
