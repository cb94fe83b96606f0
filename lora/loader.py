"""The loader process: adapter directories and hub ids in, validated page images in shared memory out.

    python -m manylora.lora.loader <config.json>

It has no GPU and no state worth keeping: a hostile file or a slow disk can cost one load, never a step.
"""

from __future__ import annotations

import logging
import sys
import time
from pathlib import Path
from typing import Any

import torch
import zmq

from manylora.lora.adapter_file import read_adapter, resolve_adapter
from manylora.lora.adapter_image import write_image
from manylora.lora.adapter_weights import bind_adapter, check_limits
from manylora.lora.page_layout import pool_geometry
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


class Loader:
    """Turns one LoadJob after another into an AdapterImage or a LoadFailed."""

    def __init__(self, config: ServerConfig) -> None:
        self._args = config.lora
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
        file = read_adapter(resolve_adapter(job.lora_path))
        if job.digest and file.digest != job.digest:
            raise AdapterChangedError(
                f"the files of {job.lora_path} are no longer those that were loaded; load the adapter again",
                param="lora_path",
            )
        weights = bind_adapter(file, self._model, self._dtype)
        check_limits(weights, self._args, job.lora_name or job.lora_path)
        layout = write_image(path, weights, self._geometry, self._dtype)
        logger.debug("laid out %s in %.3f s", job.lora_path, time.monotonic() - started)
        return AdapterImage(
            job.job,
            str(path),
            file.digest,
            weights.ranks,
            weights.scalings,
            layout.num_pages,
            layout.num_slices,
        )


def main(config: ServerConfig, context: ChildContext) -> None:
    """Serve the scheduler's jobs until it or the supervisor says Shutdown."""
    torch.set_num_threads(1)
    loader = Loader(config)
    pipe: Pipe[LoaderToScheduler, SchedulerToLoader] = context.connect(
        "loader", sends=LoaderToScheduler, receives=SchedulerToLoader
    )
    pipe.send(LoaderReady())
    context.ready()
    poller: Any = zmq.Poller()
    for socket in (pipe.socket, context.supervisor.socket):
        poller.register(socket, zmq.POLLIN)
    try:
        while True:
            poller.poll()
            if context.supervisor.recv() is not None:  # whatever it says, it means the end
                return
            message = pipe.recv()
            if isinstance(message, Shutdown):
                return
            if isinstance(message, LoadJob):
                pipe.send(loader.handle(message))
    finally:
        pipe.close()


if __name__ == "__main__":
    run_child("loader", sys.argv[1:], main)
