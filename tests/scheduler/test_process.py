"""The scheduler's process as its peers see it: the test holds the other end of every pipe."""

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from manylora.runtime.child_process import ChildProcess
from manylora.runtime.config import LoRAArgs, LoRAPath, ModelArgs, ParallelArgs, ServerConfig
from manylora.runtime.errors import AdapterRejectedError, ErrorInfo, OutOfMemoryError
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import (
    AdapterImage,
    AdapterReply,
    AdapterStaged,
    ChildFailed,
    ChildReady,
    Done,
    FlushCache,
    FrontToScheduler,
    GetState,
    LoadAdapter,
    LoaderReady,
    LoaderRestarted,
    LoaderToScheduler,
    LoadFailed,
    LoadJob,
    SchedulerToFront,
    SchedulerToLoader,
    SchedulerToWorker,
    ServerInfo,
    Shutdown,
    StageAdapter,
    State,
    WorkerFailed,
    WorkerReady,
    WorkerToScheduler,
)
from manylora.scheduler.process import milliseconds_to_first
from manylora.scheduler.quiet_time import QUIET_S
from tests.runtime.fakes import REPOSITORY

MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
WAIT_MS = 10_000


class Peers:
    """Everyone the scheduler's process talks to."""

    def __init__(
        self,
        directory: Path,
        *,
        lora_paths: tuple[LoRAPath, ...] = (),
        module: str = "manylora.scheduler.process",
    ) -> None:
        (directory / "config.json").write_text(json.dumps(MODEL))
        self.images = directory / "images"
        self.images.mkdir()
        self.config = ServerConfig(
            model=ModelArgs(
                model_path="m", model_dir=str(directory), tokenizer_path="t", dtype="float32", device="cpu"
            ),
            lora=LoRAArgs(enable_lora=True, lora_paths=lora_paths),
            parallel=ParallelArgs(tp_size=2),
            run_dir=str(directory),
            shm_dir=str(self.images),
            supervisor_pid=os.getpid(),
        )
        self._zmq: zmq.Context[Any] = zmq.Context()
        self._pipes: list[Pipe[Any, Any]] = []
        self.scheduler = ChildProcess(self._zmq, self.config, "scheduler", module)
        self.front = self._connect("front", FrontToScheduler, SchedulerToFront)
        self.loader = self._connect("loader", LoaderToScheduler, SchedulerToLoader)
        self.workers = [
            self._connect(f"worker{rank}", WorkerToScheduler, SchedulerToWorker) for rank in range(2)
        ]

    def _connect(self, name: str, sends: Any, receives: Any, epoch: int = 0) -> Pipe[Any, Any]:
        address = pipe_address(self.config.run_dir, name, epoch)
        pipe: Pipe[Any, Any] = Pipe(
            self._zmq, address, bind=False, sends=sends, receives=receives, epoch=epoch
        )
        self._pipes.append(pipe)
        return pipe

    def connect_next_loader(self) -> None:
        self.loader = self._connect("loader", LoaderToScheduler, SchedulerToLoader, epoch=1)

    def get_ready(self) -> None:
        self.loader.send(LoaderReady())
        for rank, num_pages in enumerate((100, 90)):
            self.workers[rank].send(WorkerReady(rank, num_pages, 40 + rank, 64, "cpu", "float32"))

    def serve(self) -> ServerInfo:
        self.get_ready()
        info = next_message(self.front)
        assert isinstance(info, ServerInfo)
        assert next_message(self.scheduler.pipe) == ChildReady()
        return info

    def close(self) -> None:
        self.scheduler.reap()
        self.scheduler.close()
        for pipe in self._pipes:
            pipe.socket.close(linger=0)
        self._zmq.term()


@pytest.fixture
def directory() -> Iterator[Path]:
    """A short path, for sockets."""
    with tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def peers(directory: Path) -> Iterator[Peers]:
    peers = Peers(directory)
    yield peers
    peers.close()


def next_message(pipe: Pipe[Any, Any]) -> Any:
    while True:
        assert pipe.wait(WAIT_MS), f"nothing came from {pipe.address}"
        if (message := pipe.recv()) is not None:
            return message


def exit_code(child: ChildProcess) -> int:
    os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
    child.reap()
    return child.exit_code


def test_the_front_is_told_what_the_smallest_rank_has_room_for(peers: Peers) -> None:
    info = peers.serve()
    assert (info.num_pages, info.num_host_pages) == (90, 40)
    assert info.max_total_tokens == 90 * 16
    assert (info.context_length, info.dtype, info.device) == (512, "float32", "cpu")
    assert (info.model_dir, info.tokenizer_dir) == (peers.config.run_dir, "t")


@pytest.mark.parametrize(
    ("due", "milliseconds"),
    [
        ((None, None), None),
        ((0.0, None), 0),
        ((None, 0.0), 0),
        ((0.0201, 1.0), 21),
        ((1e12, None), 3_600_000),
    ],
)
def test_it_sleeps_until_the_first_thing_is_due(
    due: tuple[float | None, ...], milliseconds: int | None
) -> None:
    assert milliseconds_to_first(*due) == milliseconds


def test_shutdown_reaches_everyone(peers: Peers) -> None:
    peers.serve()
    peers.scheduler.pipe.send(Shutdown())
    for pipe in (peers.loader, *peers.workers):
        assert next_message(pipe) == Shutdown()
    assert exit_code(peers.scheduler) == 0


@pytest.fixture
def wrong(directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Peers]:
    """With a scheduler whose books are wrong."""
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    peers = Peers(directory, module="tests.scheduler.wrong_books")
    yield peers
    peers.close()


def complaint(scheduler: ChildProcess) -> str:
    failed = next_message(scheduler.pipe)
    assert isinstance(failed, ChildFailed)
    assert exit_code(scheduler) == 1
    return failed.error.message


def test_wrong_books_end_it_after_a_quiet_second(wrong: Peers) -> None:
    wrong.serve()
    wrong.front.send(GetState(0))
    assert isinstance(next_message(wrong.front), State)
    assert not wrong.scheduler.pipe.wait(int(QUIET_S * 500))
    assert complaint(wrong.scheduler) == "AssertionError: wrong, while garbage is left"


def test_wrong_books_are_told_at_the_end_when_everyone_else_knows(wrong: Peers) -> None:
    wrong.serve()
    wrong.scheduler.pipe.send(Shutdown())
    for pipe in (wrong.loader, *wrong.workers):
        assert next_message(pipe) == Shutdown()
    assert complaint(wrong.scheduler).startswith("AssertionError: wrong")


def test_a_worker_that_fails_ends_it_with_the_workers_error(peers: Peers) -> None:
    error = OutOfMemoryError("worker 1: it does not fit").info()
    peers.workers[1].send(WorkerFailed(1, error))
    assert next_message(peers.scheduler.pipe) == ChildFailed(error)
    assert exit_code(peers.scheduler) == 1


def test_workers_must_agree_on_the_dtype(peers: Peers) -> None:
    peers.loader.send(LoaderReady())
    for rank, dtype in enumerate(("float32", "bfloat16")):
        peers.workers[rank].send(WorkerReady(rank, 100, 40, 64, "cpu", dtype))
    failed = next_message(peers.scheduler.pipe)
    assert failed.error.message == "the workers run in ['bfloat16', 'float32'], not in float32"


def test_adapters_of_the_command_line_are_loaded_before_the_front_hears(directory: Path) -> None:
    peers = Peers(directory, lora_paths=(LoRAPath("a", "/adapters/a"),))
    try:
        peers.get_ready()
        job = next_message(peers.loader)
        assert isinstance(job, LoadJob)
        assert job.lora_path == "/adapters/a"
        assert peers.front.recv() is None
        error = AdapterRejectedError("there is no /adapters/a").info()
        peers.loader.send(LoadFailed(job.job, error))
        expected = msgspec.structs.replace(
            error, message="--lora-paths a: there is no /adapters/a", param="lora_paths"
        )
        assert next_message(peers.scheduler.pipe) == ChildFailed(expected)
    finally:
        peers.close()


def image(job: int, path: str) -> AdapterImage:
    ranks = ((8,) * 7,) * 2
    scalings = ((1.0,) * 7,) * 2
    return AdapterImage(job, path, "d", ranks, scalings, num_pages=2, num_slices=1)


def test_every_worker_gets_the_same_bytes_in_the_same_order(peers: Peers) -> None:
    peers.serve()
    peers.front.send(LoadAdapter(0, "a", "/adapters/a"))
    job = next_message(peers.loader)
    peers.loader.send(image(job.job, "/nowhere/a"))
    first, second = (next_message(worker) for worker in peers.workers)
    assert isinstance(first, StageAdapter)
    assert first == second


def test_a_lost_loader_fails_its_jobs_and_the_next_one_gets_the_later_ones(peers: Peers) -> None:
    peers.serve()
    peers.front.send(LoadAdapter(0, "a", "/adapters/a"))
    assert next_message(peers.loader) == LoadJob(1, "/adapters/a", lora_name="a")
    peers.loader.close()
    peers.scheduler.pipe.send(LoaderRestarted(1))
    reply = next_message(peers.front)
    assert isinstance(reply, AdapterReply)
    assert reply.error is not None
    assert reply.error.code == "worker_crashed"
    peers.front.send(LoadAdapter(1, "b", "/adapters/b"))
    peers.front.send(FlushCache(2))
    assert next_message(peers.front) == Done(2)  # it has seen the load and serves on
    peers.connect_next_loader()
    peers.loader.send(LoaderReady())
    job = next_message(peers.loader)
    assert job.lora_path == "/adapters/b"


def test_a_lost_loaders_unfinished_image_is_removed_and_a_finished_one_kept(peers: Peers) -> None:
    peers.serve()
    peers.front.send(LoadAdapter(0, "a", "/adapters/a"))
    whole, half = peers.images / "whole", peers.images / "half"
    whole.write_bytes(b"\0")
    peers.loader.send(image(next_message(peers.loader).job, str(whole)))
    assert isinstance(next_message(peers.workers[0]), StageAdapter)
    peers.front.send(LoadAdapter(1, "b", "/adapters/b"))
    next_message(peers.loader)
    half.write_bytes(b"\0")
    peers.loader.close()
    peers.scheduler.pipe.send(LoaderRestarted(1))
    assert next_message(peers.front).error.code == "worker_crashed"
    assert list(peers.images.iterdir()) == [whole]


def test_a_loader_lost_with_several_loads_under_way(peers: Peers) -> None:
    """The load whose answer had left counts; every other fails once, and only the finished image stays."""
    peers.serve()
    for call, name in enumerate("abcd"):
        peers.front.send(LoadAdapter(call, name, f"/adapters/{name}"))
    jobs = {job.lora_name: job for job in (next_message(peers.loader) for _ in range(4))}
    for name in "abc":  # d has not begun
        (peers.images / name).write_bytes(b"\0")
    peers.loader.send(image(jobs["b"].job, str(peers.images / "b")))
    assert isinstance(next_message(peers.workers[0]), StageAdapter)
    peers.loader.close()
    peers.scheduler.pipe.send(LoaderRestarted(1))
    replies = [next_message(peers.front) for _ in range(3)]
    assert sorted(reply.call for reply in replies) == [0, 2, 3]
    assert {reply.error.code for reply in replies} == {"worker_crashed"}
    assert list(peers.images.iterdir()) == [peers.images / "b"]
    for rank, worker in enumerate(peers.workers):
        worker.send(AdapterStaged(rank, 1))
    reply = next_message(peers.front)
    assert (reply.call, reply.error, list(reply.loaded)) == (1, None, ["b"])
    wait_until_empty(peers.images)


def wait_until_empty(directory: Path) -> None:
    """Images are removed beside the loop."""
    deadline = time.monotonic() + WAIT_MS / 1000
    while list(directory.iterdir()):
        assert time.monotonic() < deadline, "an image was left"
        time.sleep(0.01)


def test_a_front_that_vanishes_is_the_supervisors_to_explain(peers: Peers) -> None:
    """Its last answer finds nobody; told to end within a moment, the scheduler does so without complaint."""
    peers.serve()
    peers.front.send(FlushCache(0))
    assert next_message(peers.front) == Done(0)
    peers.front.send(LoadAdapter(1, "a", "/adapters/a"))
    job = next_message(peers.loader)
    peers.front.close()
    peers.loader.send(LoadFailed(job.job, ErrorInfo("x", "y", 400)))
    peers.scheduler.pipe.send(Shutdown())
    assert exit_code(peers.scheduler) == 0
    assert peers.scheduler.pipe.recv() is None
