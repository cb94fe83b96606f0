"""The loader: every job is answered, good files with an image, bad ones with their error; it lives on."""

import os
import queue
import random
import select
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import zmq
from safetensors.torch import load_file, save_file

from manylora.lora.loader import Loader, LoadThreads, num_load_threads
from manylora.lora.page_layout import adapter_layout, pool_geometry
from manylora.runtime.config import LoRAArgs, ModelArgs, ParallelArgs, ServerConfig
from manylora.runtime.errors import ManyloraError
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
    assert answer.num_bytes == 2 * layout.num_bytes
    assert answer.revision == ""


def test_an_adapter_out_of_the_hubs_cache_says_its_revision(
    config: ServerConfig, adapter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by its hub id, without a network, where a download would have put it."""
    repository, revision = tmp_path / "hub/models--org--adapter", "0123456789abcdef" * 2 + "01234567"
    shutil.copytree(adapter, repository / "snapshots" / revision)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(revision)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    answer = Loader(config).handle(LoadJob(3, "org/adapter"))
    assert isinstance(answer, AdapterImage)
    assert answer.revision == revision


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


def test_a_changed_and_broken_file_is_a_changed_one(
    config: ServerConfig, adapter: str, tmp_path: Path
) -> None:
    """Whoever loads again what is registered is told that it changed, whatever else is wrong with it now."""
    copy = Path(shutil.copytree(adapter, tmp_path / "copy"))
    loader = Loader(config)
    first = loader.handle(LoadJob(1, str(copy)))
    assert isinstance(first, AdapterImage)
    Path(first.path).unlink()
    tensors = load_file(copy / "adapter_model.safetensors")
    next(reversed(tensors.values())).fill_(float("nan"))
    save_file(tensors, copy / "adapter_model.safetensors")
    for number, (digest, code) in enumerate((("", "adapter_rejected"), (first.digest, "adapter_changed")), 2):
        answer = loader.handle(LoadJob(number, str(copy), digest))
        assert isinstance(answer, LoadFailed)
        assert answer.error.code == code
        assert images(config) == []


# ---- several at once --------------------------------------------------------------------------------------------------


class SlowLoads:
    """Answers each job when told to."""

    def __init__(self) -> None:
        self.begun: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.may_end = [threading.Event() for _ in range(4)]

    def handle(self, job: LoadJob) -> LoadFailed:
        self.begun.put(job.job)
        assert self.may_end[job.job].wait(WAIT_S)
        return LoadFailed(job.job, ManyloraError("x").info())


WAIT_S = 20


def drain(threads: LoadThreads, count: int) -> list[Any]:
    answers: list[Any] = []
    while len(answers) < count:
        assert select.select([threads.fileno()], [], [], WAIT_S)[0], "no answer"
        answers += threads.drain()
    return answers


def test_a_slow_load_delays_no_other() -> None:
    loads = SlowLoads()
    threads = LoadThreads(loads.handle, 2)
    try:
        for job in range(4):
            threads.submit(LoadJob(job, "x"))
        assert {loads.begun.get(timeout=WAIT_S) for _ in range(2)} == {0, 1}
        assert loads.begun.empty(), "more loads at once than threads"
        assert not select.select([threads.fileno()], [], [], 0)[0]
        for job in (1, 2, 3):  # all pass by job 0
            loads.may_end[job].set()
            assert [answer.job for answer in drain(threads, 1)] == [job]
        loads.may_end[0].set()
        assert [answer.job for answer in drain(threads, 1)] == [0]
        assert not threads.drain()
    finally:
        for event in loads.may_end:
            event.set()
        threads.close()


def test_one_bad_among_many(config: ServerConfig, adapter: str, tmp_path: Path) -> None:
    """Loads that overlap give the images that each gives alone, and the bad one its own error."""
    alone = Loader(config).handle(LoadJob(99, adapter))
    assert isinstance(alone, AdapterImage)
    expected = Path(alone.path).read_bytes()
    threads = LoadThreads(Loader(config).handle, 4)
    try:
        for job in range(24):
            threads.submit(LoadJob(job, str(tmp_path) if job == 7 else adapter))
        answers = {answer.job: answer for answer in drain(threads, 24)}
    finally:
        threads.close()
    bad = answers.pop(7)
    assert bad.error.code == "adapter_rejected"
    assert sorted(answers) == [job for job in range(24) if job != 7]
    for answer in answers.values():
        assert answer.digest == alone.digest
        assert Path(answer.path).read_bytes() == expected
    assert len(images(config)) == 24


def test_what_handle_raises_is_raised_by_drain() -> None:
    def handle(job: LoadJob) -> LoadFailed:
        raise KeyError(job.job)

    threads = LoadThreads(handle, 1)
    try:
        threads.submit(LoadJob(3, "x"))
        with pytest.raises(KeyError, match="3"):
            drain(threads, 1)
    finally:
        threads.close()


def test_the_number_of_threads() -> None:
    assert [num_load_threads(cores) for cores in (1, 2, 3, 4, 16, 200)] == [1, 1, 1, 2, 8, 8]


# ---- the process ------------------------------------------------------------------------------------------------------


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
        answers = sorted((receive(scheduler) for _ in range(4)), key=lambda answer: answer.job)
        assert [answer.job for answer in answers] == [0, 1, 2, 3]
        assert [type(answer) for answer in answers] == [LoadFailed, AdapterImage, LoadFailed, AdapterImage]
        (scheduler if who == "scheduler" else supervisor).send(Shutdown())
        assert process.wait(timeout=20) == 0
    finally:
        process.kill()
        process.wait()


def receive(pipe: Pipe[Any, Any]) -> Any:
    assert pipe.wait(60_000), "the loader says nothing"
    return pipe.recv()
