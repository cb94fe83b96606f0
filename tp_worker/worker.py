"""The worker process: one rank of the tensor-parallel group, executing the scheduler's commands in the order they come.

    python -m manylora.tp_worker.worker <config.json> <tp_rank>

A plan is launched as soon as it is read; its result is sent when the device has it, never waited for. Adapter images
are read from disk beside the loop.
"""

from __future__ import annotations

import gc
import logging
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

import torch
import zmq

from manylora.lora.delta import attach_deltas
from manylora.lora.host_arena import HostArena
from manylora.lora.page_layout import PoolGeometry, pool_geometry
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
    ChildToSupervisor,
    SchedulerToWorker,
    Shutdown,
    SupervisorToChild,
    WorkerFailed,
    WorkerReady,
    WorkerToScheduler,
)
from manylora.runtime.model_config import load_model_config
from manylora.runtime.plan import ForwardBatch
from manylora.tp_worker.adapters import AdapterCommand, Adapters
from manylora.tp_worker.decode_graph import DecodeGraphs
from manylora.tp_worker.distributed import init_tp_group
from manylora.tp_worker.memory_pool import PagePool, num_host_pages_that_fit, num_pages_that_fit
from manylora.tp_worker.model_runner import ModelRunner, PendingOutput
from manylora.tp_worker.piecewise_graph import PiecewiseGraphs
from manylora.tp_worker.rehearsal import Rehearsal, rehearse
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.weight_loader import load_model

logger = logging.getLogger("manylora.worker")

NUM_SLICES = 4096  # rows of the slice table: adapters of rank 16 · 4096 in all may be resident
_IDLE_MS = 1000  # without work for this long, collect garbage


class Worker:
    """One rank: everything it computes with, and the loop that does what the scheduler says."""

    def __init__(self, config: ServerConfig, tp_rank: int, device: torch.device) -> None:
        """Join the group, load the weights, allocate the rest. Raises ConfigError and its subclasses."""
        tp_size = config.parallel.tp_size
        model_config = load_model_config(config.model.model_dir)
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._tp_rank = tp_rank
        self._group = init_tp_group(tp_rank, tp_size, device, config.run_dir, config.epoch)
        model = load_model(
            model_config,
            config.model.model_dir,
            config.model.load_format,
            dtype,
            device,
            self._group,
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
        max_pages = -(-context_length // geometry.page_size)
        vocab_size = model_config.vocab_size
        state = SlotState(config.schedule.max_running_requests, max_pages, vocab_size, device)
        pool = PagePool(geometry, num_pages_that_fit(config, model_config, geometry, device), dtype, device)
        self._runner = ModelRunner(model, pool, state, vocab_size=vocab_size, tp_rank=tp_rank)
        self._pending: deque[PendingOutput] = deque()
        self._adapters: Adapters | None = None
        num_host_pages = num_slices = 0
        if config.lora.enable_lora:
            num_host_pages, num_slices = num_host_pages_that_fit(config, geometry), NUM_SLICES
            arena = HostArena(num_host_pages, geometry.page_bytes, pinned=device.type == "cuda")
            weights = WeightPool(geometry, pool.elements, num_slices, arena)
            attach_deltas(model, weights, self._group, config.lora.sharding)
            self._adapters = Adapters(weights, tp_rank)
        if device.type == "cuda":
            self._get_ready(config, geometry, model.logits, state, context_length)
        self.ready = WorkerReady(
            tp_rank, pool.num_pages, num_host_pages, num_slices, device.type, config.model.dtype
        )

    def _get_ready(
        self,
        config: ServerConfig,
        geometry: PoolGeometry,
        logits: Callable[..., torch.Tensor],
        state: SlotState,
        context_length: int,
    ) -> None:
        """Compile every kernel, run every kind of step once and capture the graphs."""
        from manylora.kernels.compilation import compiling_ahead, report_compilations

        schedule, lora = config.schedule, config.lora
        rehearsal = Rehearsal(
            state.dummy_slot,
            schedule.max_running_requests,
            min(schedule.chunked_prefill_size, context_length),
            state.counts.shape[1],
            lora.enable_lora,
        )
        decode, pieces = self._make_graphs(config, geometry, logits, state)
        graphs = [each for each in (decode, pieces) if each is not None]
        with compiling_ahead():
            rehearse(self._runner, rehearsal.plans_to_compile())
            for each in graphs:
                each.rehearse()
        rehearse(self._runner, rehearsal.plans())
        for each in graphs:
            each.capture(show_progress=self._tp_rank == 0)
        self._runner.use_graphs(decode, pieces)
        report_compilations(partial(logger.warning, "a step waited for a kernel to be compiled: %s"))

    def _make_graphs(
        self,
        config: ServerConfig,
        geometry: PoolGeometry,
        logits: Callable[..., torch.Tensor],
        state: SlotState,
    ) -> tuple[DecodeGraphs | None, PiecewiseGraphs | None]:
        """What is to be captured. Where there are other ranks, only steps of decode rows are."""
        schedule, lora, tp_size = config.schedule, config.lora, config.parallel.tp_size
        if not schedule.cuda_graph_max_bs:
            return None, None
        forward = self._runner.model_step
        decode = DecodeGraphs(
            forward,
            logits,
            state,
            geometry,
            max_rows=min(schedule.cuda_graph_max_bs, schedule.max_running_requests),
            exchanges_planes=tp_size > 1 and lora.sharding == "slora",
            lora=lora.enable_lora,
        )
        if tp_size > 1:
            return decode, None
        pieces = PiecewiseGraphs(
            forward,
            state,
            geometry,
            max_tokens=schedule.chunked_prefill_size,
            dummy_kv_slot=self._runner.dummy_kv_slot,
            lora=lora.enable_lora,
        )
        return decode, pieces

    def serve(
        self,
        scheduler: Pipe[WorkerToScheduler, SchedulerToWorker],
        supervisor: Pipe[ChildToSupervisor, SupervisorToChild],
    ) -> None:
        """Execute commands until told to stop."""
        poller = zmq.Poller()
        for source in (scheduler.socket, supervisor.socket, self._adapters):
            if source is not None:
                poller.register(source, zmq.POLLIN)
        gc.collect()
        gc.freeze()
        gc.disable()  # a collection in the middle of a step would stall every rank
        litter = False
        while True:
            while (message := scheduler.recv()) is not None:
                if isinstance(message, Shutdown):
                    return
                self._execute(message)
                self._report(scheduler)
                litter = True
            if supervisor.recv() is not None:  # whatever it says to a worker, it means the end
                return
            self._report(scheduler)
            if self._pending or (self._adapters and self._adapters.copying):
                poller.poll(0)  # what the device works on ends without waking anybody
            elif not litter:
                poller.poll()
            elif not poller.poll(_IDLE_MS):
                gc.collect()
                litter = False

    def close(self) -> None:
        """Leave the group in order."""
        if self._adapters:
            self._adapters.close()
        self._group.close()

    def _execute(self, message: ForwardBatch | AdapterCommand) -> None:
        if isinstance(message, ForwardBatch):
            pending = self._runner.execute(message)
            if pending is not None:
                self._pending.append(pending)
        elif self._adapters is None:
            raise ProtocolError(f"{type(message).__name__} reached a worker without LoRA")
        else:
            self._adapters.execute(message)

    def _report(self, scheduler: Pipe[WorkerToScheduler, SchedulerToWorker]) -> None:
        """Send every result that is complete, in order."""
        while self._pending and self._pending[0].ready():
            scheduler.send(self._pending.popleft().output())
        if self._adapters:
            for answer in self._adapters.answers():
                scheduler.send(answer)


def set_up_torch(config: ServerConfig, tp_rank: int) -> torch.device:
    """This rank's device, and arithmetic that float32 can be checked by. Raises ConfigError."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    if config.model.device == "cpu":
        return torch.device("cpu")
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
        worker = Worker(config, tp_rank, set_up_torch(config, tp_rank))
        scheduler.send(worker.ready)
        context.ready()
        worker.serve(scheduler, context.supervisor)
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
