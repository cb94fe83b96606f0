"""The loader process: adapter directories and hub ids in, validated page images in shared memory out.

    python -m manylora.lora.loader <config.json>

It has no GPU and no state worth keeping: a hostile file or a slow disk can cost one load, never a step.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import zmq

from manylora.lora.adapter_file import AdapterFile, hub_revision, open_adapter, resolve_adapter
from manylora.lora.adapter_image import write_image
from manylora.lora.adapter_weights import bind_adapter, check_limits
from manylora.lora.page_layout import pool_geometry
from manylora.runtime.adapter_access import AdapterAccess
from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import AdapterChangedError, ManyloraError
from manylora.runtime.ipc import Pipe
from manylora.runtime.messages import (
    AdapterImage,
    LoaderReady,
    LoaderToScheduler,
    LoadFailed,
    LoadJob,
    SchedulerToLoader,
    Shutdown,
)
from manylora.runtime.model_config import DTYPE_BYTES, load_model_config

logger = logging.getLogger("manylora.lora")

_MAX_THREADS = 8


class Loader:
    """Turns LoadJobs into an AdapterImage or a LoadFailed each. Has no state: any thread may call it."""

    def __init__(self, config: ServerConfig) -> None:
        self._args = config.lora
        self._access = AdapterAccess(config)
        self._model = load_model_config(config.model.model_dir)
        self._dtype: torch.dtype = getattr(torch, config.model.dtype)
        self._geometry = pool_geometry(
            self._model,
            tp_size=config.parallel.tp_size,
            sharding=config.lora.sharding,
            page_size=config.cache.page_size,
            itemsize=DTYPE_BYTES[config.model.dtype],
        )
        self._shm_dir = Path(config.shm_dir)
        self._epoch = config.epoch

    def handle(self, job: LoadJob) -> AdapterImage | LoadFailed:
        """Never raises: whatever is wrong with the adapter, or with us, is the answer."""
        path = self._shm_dir / f"adapter-{self._epoch}-{job.job}"
        try:
            return self._load(job, path)
        except Exception as error:
            path.unlink(missing_ok=True)
            if isinstance(error, ManyloraError):
                return LoadFailed(job.job, error.info())
            logger.exception("loading %s failed", job.lora_path)
            message = f"loading {job.lora_path} failed: {type(error).__name__}: {error}"
            return LoadFailed(job.job, ManyloraError(message).info())

    def _load(self, job: LoadJob, path: Path) -> AdapterImage:
        started = time.monotonic()
        permit = self._access.permit(job.lora_path)
        directory = resolve_adapter(permit)
        with open_adapter(directory, permit.root) as file:
            try:
                image = self._lay_out(job, file, path, hub_revision(directory))
            except ManyloraError:
                if job.digest:  # what is wrong with it may be what has changed
                    _check_unchanged(job, file)
                raise
            if job.digest:
                _check_unchanged(job, file)
            logger.debug("laid out %s in %.3f s", job.lora_path, time.monotonic() - started)
            return image

    def _lay_out(self, job: LoadJob, file: AdapterFile, path: Path, revision: str) -> AdapterImage:
        weights = bind_adapter(file, self._model, self._dtype)
        check_limits(weights.ranks, self._args, job.lora_name or job.lora_path)
        layout = write_image(path, weights, self._geometry, self._dtype)
        return AdapterImage(
            job.job,
            str(path),
            file.digest(),
            weights.ranks,
            weights.scalings,
            layout.num_pages,
            layout.num_slices,
            revision,
            layout.num_bytes * self._geometry.tp_size,
        )


def _check_unchanged(job: LoadJob, file: AdapterFile) -> None:
    if file.digest() != job.digest:
        raise AdapterChangedError(
            f"the files of {job.lora_path} are no longer those that were loaded; load the adapter again",
            param="lora_path",
        )


class LoadThreads:
    """Several loads at once: hashing, reading, torch and writing let other threads run.

    Poll `fileno()`: it is readable while `drain()` has answers. They leave in the order in which they are done.
    """

    def __init__(self, handle: Callable[[LoadJob], AdapterImage | LoadFailed], num_threads: int) -> None:
        self._handle = handle
        self._threads = ThreadPoolExecutor(num_threads, "load")
        self._done: queue.SimpleQueue[Future[AdapterImage | LoadFailed]] = queue.SimpleQueue()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)

    def submit(self, job: LoadJob) -> None:
        """Have it handled, after those submitted before have begun."""
        self._threads.submit(self._handle, job).add_done_callback(self._on_done)

    def fileno(self) -> int:
        return self._wake_read.fileno()

    def drain(self) -> list[AdapterImage | LoadFailed]:
        """The answers that are here now. Never waits. Raises what `handle` raised."""
        with contextlib.suppress(BlockingIOError):
            self._wake_read.recv(4096)
        answers: list[AdapterImage | LoadFailed] = []
        with contextlib.suppress(queue.Empty):
            while True:
                answers.append(self._done.get_nowait().result())
        return answers

    def close(self) -> None:
        """Finish the loads that have begun, drop the others, and end the threads."""
        self._threads.shutdown(cancel_futures=True)
        self._wake_read.close()
        self._wake_write.close()

    def _on_done(self, future: Future[AdapterImage | LoadFailed]) -> None:
        self._done.put(future)
        with contextlib.suppress(BlockingIOError):  # full: the main thread is being woken anyway
            self._wake_write.send(b"\0")


def num_load_threads(num_cores: int) -> int:
    """Half the cores: the other half serves. More than a few gain nothing, as each holds the interpreter at times."""
    return max(1, min(_MAX_THREADS, num_cores // 2))


def main(config: ServerConfig, context: ChildContext) -> None:
    """Serve the scheduler's jobs until it or the supervisor says Shutdown, which waits for none of them."""
    torch.set_num_threads(1)
    pipe: Pipe[LoaderToScheduler, SchedulerToLoader] = context.connect(
        "loader", sends=LoaderToScheduler, receives=SchedulerToLoader
    )
    threads = LoadThreads(Loader(config).handle, num_load_threads(len(os.sched_getaffinity(0))))
    gc.collect()
    gc.freeze()  # a collection that walks through all of torch takes longer than a load
    pipe.send(LoaderReady())
    context.ready()
    poller: Any = zmq.Poller()
    for source in (pipe.socket, context.supervisor.socket, threads):
        poller.register(source, zmq.POLLIN)
    try:
        while True:
            poller.poll()
            if context.supervisor.recv() is not None:  # whatever it says, it means the end
                return
            for message in pipe.drain():
                if isinstance(message, Shutdown):
                    return
                threads.submit(message)
            for answer in threads.drain():
                pipe.send(answer)
    finally:
        pipe.close()


if __name__ == "__main__":
    run_child("loader", sys.argv[1:], main)
