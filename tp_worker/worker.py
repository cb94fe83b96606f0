"""The worker process: one rank of the tensor-parallel group, executing the scheduler's commands in the order they come.

    python -m manylora.tp_worker.worker <config.json> <tp_rank>

A plan is launched as soon as it is read; its result is sent when the device has it, never waited for. Adapter images
are read from disk beside the loop.
"""

from __future__ import annotations

import gc
import os
import sys
from collections import deque
from dataclasses import dataclass

import torch
import zmq

from manylora.lora.delta import attach_deltas
from manylora.lora.host_arena import HostArena
from manylora.lora.page_layout import pool_geometry
from manylora.lora.staging import StagingThread
from manylora.lora.weight_pool import WeightPool
from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import (
    ConfigError,
    ManyloraError,
    OutOfMemoryError,
    ProtocolError,
    WorkerCrashedError,
)
from manylora.runtime.ipc import Pipe
from manylora.runtime.messages import (
    AdapterCopied,
    ChildToSupervisor,
    CopyAdapter,
    DropAdapter,
    SchedulerToWorker,
    Shutdown,
    StageAdapter,
    SupervisorToChild,
    WorkerFailed,
    WorkerReady,
    WorkerToScheduler,
    unpack_i32,
)
from manylora.runtime.model_config import load_model_config
from manylora.runtime.plan import ForwardBatch
from manylora.tp_worker.distributed import init_tp_group
from manylora.tp_worker.memory_pool import PagePool, num_host_pages_that_fit, num_pages_that_fit
from manylora.tp_worker.model_runner import ModelRunner, PendingOutput
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.weight_loader import load_model

NUM_SLICES = 4096  # rows of the slice table: rank 16 · 4096 may be resident at once
_IDLE_MS = 1000  # without work for this long, collect garbage


@dataclass(slots=True)
class Engine:
    """What a rank computes with. `weights` is None without LoRA."""

    runner: ModelRunner
    weights: WeightPool | None
    ready: WorkerReady


def build_engine(config: ServerConfig, tp_rank: int, device: torch.device) -> Engine:
    """Join the group, load the weights and allocate everything else. Raises ConfigError and its subclasses."""
    tp_size = config.parallel.tp_size
    model_config = load_model_config(config.model.model_dir)
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    group = init_tp_group(tp_rank, tp_size, device, config.run_dir, config.epoch)
    model = load_model(
        model_config,
        config.model.model_dir,
        config.model.load_format,
        dtype,
        device,
        group,
        config.model.random_seed,
        progress=tp_rank == 0,
    )
    geometry = pool_geometry(
        model_config,
        tp_size=tp_size,
        sharding=config.lora.sharding,
        page_size=config.cache.page_size,
        itemsize=dtype.itemsize,
    )
    context_length = config.model.context_length or model_config.max_position_embeddings
    state = SlotState(
        config.schedule.max_running_requests,
        -(-context_length // geometry.page_size),
        model_config.vocab_size,
        device,
    )
    pool = PagePool(geometry, num_pages_that_fit(config, model_config, geometry, device), dtype, device)
    runner = ModelRunner(model, pool, state, vocab_size=model_config.vocab_size, tp_rank=tp_rank)
    num_host_pages = num_host_pages_that_fit(config, geometry)
    num_slices = NUM_SLICES if config.lora.enable_lora else 0
    weights = None
    if config.lora.enable_lora:
        arena = HostArena(num_host_pages, geometry.page_bytes, pinned=device.type == "cuda")
        weights = WeightPool(geometry, pool.elements, num_slices, arena)
        attach_deltas(model, weights, group, config.lora.sharding)
    ready = WorkerReady(tp_rank, pool.num_pages, num_host_pages, num_slices, str(device), config.model.dtype)
    return Engine(runner, weights, ready)


class Worker:
    """The loop between the scheduler's pipe and the engine."""

    def __init__(
        self,
        tp_rank: int,
        engine: Engine,
        scheduler: Pipe[WorkerToScheduler, SchedulerToWorker],
        supervisor: Pipe[ChildToSupervisor, SupervisorToChild],
    ) -> None:
        self._tp_rank = tp_rank
        self._runner = engine.runner
        self._weights = engine.weights
        self._staging = StagingThread(engine.weights, tp_rank) if engine.weights else None
        self._scheduler = scheduler
        self._supervisor = supervisor
        self._pending: deque[PendingOutput] = deque()
        self._poller = zmq.Poller()
        self._poller.register(scheduler.socket, zmq.POLLIN)
        self._poller.register(supervisor.socket, zmq.POLLIN)
        if self._staging:
            self._poller.register(self._staging.fileno(), zmq.POLLIN)

    def run(self) -> None:
        """Execute commands until told to stop."""
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the middle of a step would stall every rank
        litter = False
        while True:
            while (message := self._scheduler.recv()) is not None:
                if isinstance(message, Shutdown):
                    return
                self._execute(message)
                self._report()
                litter = True
            if self._supervisor.recv() is not None:  # whatever it says to a worker, it means: stop
                return
            self._report()
            if self._on_device():
                self._poller.poll(0)
            elif litter:
                if not self._poller.poll(_IDLE_MS):
                    gc.collect()
                    litter = False
            else:
                self._poller.poll()

    def close(self) -> None:
        if self._staging:
            self._staging.close()

    def _execute(self, message: SchedulerToWorker) -> None:
        if isinstance(message, ForwardBatch):
            pending = self._runner.execute(message)
            if pending is not None:
                self._pending.append(pending)
        elif self._weights is None or self._staging is None:
            raise ProtocolError(f"{type(message).__name__} reached a worker without LoRA")
        elif isinstance(message, CopyAdapter):
            self._weights.copy(message.version, unpack_i32(message.pages), unpack_i32(message.slices))
        elif isinstance(message, StageAdapter | DropAdapter):
            self._staging.submit(message)

    def _report(self) -> None:
        """Send every result that is complete, in order."""
        while self._pending and self._pending[0].ready():
            self._scheduler.send(self._pending.popleft().output())
        if self._weights and self._staging:
            for version in self._weights.done():
                self._scheduler.send(AdapterCopied(self._tp_rank, version))
            for answer in self._staging.drain():
                self._scheduler.send(answer)

    def _on_device(self) -> bool:
        """Whether the device works on something whose end only polling tells."""
        return bool(self._pending) or (self._weights is not None and self._weights.copying)


def set_up_torch(config: ServerConfig, tp_rank: int) -> torch.device:
    """This rank's device, and arithmetic that float32 can be checked by. Raises ConfigError."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if config.model.device == "cpu":
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // config.parallel.tp_size))
        return torch.device("cpu")
    torch.set_num_threads(1)
    if torch.cuda.device_count() <= tp_rank:
        raise ConfigError(
            f"CUDA shows {torch.cuda.device_count()} devices, rank {tp_rank} needs device {tp_rank}",
            param="device",
        )
    device = torch.device("cuda", tp_rank)
    torch.cuda.set_device(device)
    return device


def main(config: ServerConfig, context: ChildContext) -> None:
    """Serve until told to stop; tell the scheduler why when that is impossible."""
    tp_rank = int(context.args[0])
    scheduler = context.connect(f"worker{tp_rank}", sends=WorkerToScheduler, receives=SchedulerToWorker)
    try:
        engine = build_engine(config, tp_rank, set_up_torch(config, tp_rank))
        worker = Worker(tp_rank, engine, scheduler, context.supervisor)
        scheduler.send(engine.ready)
        context.ready()
        worker.run()
        worker.close()
    except Exception as error:
        scheduler.send(WorkerFailed(tp_rank, as_manylora_error(error, tp_rank).info()))
        raise
    finally:
        scheduler.close()
        context.zmq.term()  # returns once the last message has left, or its time is over


def as_manylora_error(error: Exception, tp_rank: int) -> ManyloraError:
    """What the user should be told."""
    if isinstance(error, ManyloraError):
        return error
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    if isinstance(error, torch.OutOfMemoryError):
        return OutOfMemoryError(f"worker {tp_rank}: {reason}", param="mem_fraction_static")
    return WorkerCrashedError(f"worker {tp_rank} failed: {reason}")


if __name__ == "__main__":
    run_child(f"worker{sys.argv[2]}", sys.argv[1:], main)
