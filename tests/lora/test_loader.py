"""The loader: every job is answered, good files with an image, bad ones with their error; it lives on."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq

from manylora.lora.loader import Loader
from manylora.lora.page_layout import adapter_layout, pool_geometry
from manylora.runtime.config import LoRAArgs, ModelArgs, ParallelArgs, ServerConfig
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import (
    AdapterImage,
    ChildReady,
    ChildToSupervisor,
    LoaderReady,
    LoaderToScheduler,
    LoadFailed,
    LoadJob,
    SchedulerToLoader,
    Shutdown,
    SupervisorToChild,
)
from manylora.runtime.model_config import load_model_config
from tests.lora.adapters import write_adapter
from tests.tiny_models import TinyModels


@pytest.fixture
def config(tiny_models: TinyModels, tmp_path: Path) -> ServerConfig:
    for name in ("run", "shm"):
        (tmp_path / name).mkdir()
    model_dir = str(tiny_models.model("llama"))
    return ServerConfig(
        model=ModelArgs(model_path=model_dir, model_dir=model_dir, dtype="float32", device="cpu"),
        lora=LoRAArgs(enable_lora=True),
        parallel=ParallelArgs(tp_size=2),
        run_dir=str(tmp_path / "run"),
        shm_dir=str(tmp_path / "shm"),
    )


@pytest.fixture
def adapter(tiny_models: TinyModels) -> str:
    return str(tiny_models.adapter("llama", "patterns"))


def images(config: ServerConfig) -> list[str]:
    return sorted(os.listdir(config.shm_dir))


def test_an_image_and_what_it_says(config: ServerConfig, adapter: str) -> None:
    answer = Loader(config).handle(LoadJob(3, adapter))
    assert isinstance(answer, AdapterImage)
    assert answer.job == 3
    assert answer.ranks[0] == (4, 8, 8, 12, 8, 8, 8)
    assert answer.ranks[1] == (4, 8, 8, 12, 8, 8, 20)
    assert answer.scalings[0][:4] == (4.0, 2.0, 0.5, 2.5)
    geometry = pool_geometry(
        load_model_config(config.model.model_dir), tp_size=2, sharding="slora", page_size=16, itemsize=4
    )
    layout = adapter_layout(geometry, answer.ranks)
    assert (answer.num_pages, answer.num_slices) == (layout.num_pages, 2)
    assert Path(answer.path).stat().st_size == 2 * layout.num_pages * geometry.page_bytes
    assert images(config) == [Path(answer.path).name]


def test_the_digest_must_be_the_registered_one(config: ServerConfig, adapter: str) -> None:
    loader = Loader(config)
    first = loader.handle(LoadJob(1, adapter))
    assert isinstance(first, AdapterImage)
    assert isinstance(loader.handle(LoadJob(2, adapter, first.digest)), AdapterImage)
    changed = loader.handle(LoadJob(3, adapter, "0" * 64))
    assert isinstance(changed, LoadFailed)
    assert changed.error.code == "adapter_changed"
    assert len(images(config)) == 2


def test_limits_name_the_adapter(config: ServerConfig, adapter: str) -> None:
    limited = msgspec.structs.replace(config, lora=LoRAArgs(enable_lora=True, max_lora_rank=16))
    answer = Loader(limited).handle(LoadJob(1, adapter, lora_name="summer"))
    assert isinstance(answer, LoadFailed)
    assert answer.error.code == "adapter_limit"
    assert answer.error.message.startswith("LoRA adapter summer with rank 20 is incompatible")


@pytest.mark.parametrize(
    ("tensors", "fields", "code"),
    [
        ({"lm_head.lora_A.weight": torch.ones(2)}, {}, "adapter_rejected"),
        ({"x": torch.ones(1)}, {"use_dora": True}, "adapter_rejected"),
    ],
    ids=["unbound", "dora"],
)
def test_bad_files_leave_no_image(
    config: ServerConfig, tmp_path: Path, tensors: dict[str, torch.Tensor], fields: dict[str, Any], code: str
) -> None:
    answer = Loader(config).handle(LoadJob(1, str(write_adapter(tmp_path / "bad", tensors, **fields))))
    assert isinstance(answer, LoadFailed)
    assert (answer.job, answer.error.code, answer.error.status) == (1, code, 400)
    assert images(config) == []


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_damaged_files_are_the_adapters_fault(
    config: ServerConfig, adapter: str, tmp_path: Path, name: str
) -> None:
    """Whatever byte is changed, the answer is an image or a refusal with a reason, never an internal error."""
    copy = Path(shutil.copytree(adapter, tmp_path / "damaged"))
    original = (copy / name).read_bytes()
    loader, generator = Loader(config), random.Random(5)
    refused = 0
    for job in range(150):
        data = bytearray(original)
        for _ in range(generator.choice((1, 1, 8))):
            data[generator.randrange(min(len(data), 1500))] = generator.randrange(256)
        (copy / name).write_bytes(
            data[: generator.choice((len(data), len(data), generator.randrange(len(data))))]
        )
        answer = loader.handle(LoadJob(job, str(copy)))
        if isinstance(answer, LoadFailed):
            assert answer.error.code == "adapter_rejected", answer.error
            refused += 1
    assert refused > 50


def test_our_own_failure_is_an_answer_too(config: ServerConfig, adapter: str) -> None:
    os.rmdir(config.shm_dir)
    answer = Loader(config).handle(LoadJob(1, adapter))
    assert isinstance(answer, LoadFailed)
    assert answer.error.code == "internal_error"
    assert "FileNotFoundError" in answer.error.message


@pytest.fixture
def pipes(
    config: ServerConfig,
) -> Iterator[tuple[Pipe[SchedulerToLoader, LoaderToScheduler], Pipe[SupervisorToChild, ChildToSupervisor]]]:
    """What the scheduler and the supervisor bind."""
    context: zmq.Context[Any] = zmq.Context()
    scheduler: Pipe[Any, Any] = Pipe(
        context,
        pipe_address(config.run_dir, "loader"),
        bind=True,
        sends=SchedulerToLoader,
        receives=LoaderToScheduler,
    )
    supervisor: Pipe[Any, Any] = Pipe(
        context,
        pipe_address(config.run_dir, "supervisor-loader"),
        bind=True,
        sends=SupervisorToChild,
        receives=ChildToSupervisor,
    )
    yield scheduler, supervisor
    scheduler.close()
    supervisor.close()
    context.term()


@pytest.mark.parametrize("who", ["scheduler", "supervisor"])
def test_the_process(
    config: ServerConfig,
    adapter: str,
    tmp_path: Path,
    pipes: tuple[Pipe[Any, Any], Pipe[Any, Any]],
    who: str,
) -> None:
    scheduler, supervisor = pipes
    config_path = tmp_path / "config.json"
    config_path.write_bytes(msgspec.json.encode(config))
    process = subprocess.Popen([sys.executable, "-m", "manylora.lora.loader", str(config_path)])
    try:
        assert receive(scheduler) == LoaderReady()
        assert receive(supervisor) == ChildReady()
        for job, path in enumerate((str(tmp_path), adapter, "/nowhere", adapter)):
            scheduler.send(LoadJob(job, path))
        answers = [receive(scheduler) for _ in range(4)]
        assert [type(answer) for answer in answers] == [LoadFailed, AdapterImage, LoadFailed, AdapterImage]
        assert [answer.job for answer in answers] == [0, 1, 2, 3]
        (scheduler if who == "scheduler" else supervisor).send(Shutdown())
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def receive(pipe: Pipe[Any, Any]) -> Any:
    assert pipe.wait(60_000), "the loader says nothing"
    return pipe.recv()
