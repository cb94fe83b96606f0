"""Worker processes over real pipes: the test plays supervisor and scheduler."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import zmq

from manylora.lora.loader import Loader
from manylora.runtime.child_process import ChildProcess
from manylora.runtime.config import (
    CacheArgs,
    LoRAArgs,
    LoRASharding,
    ModelArgs,
    ParallelArgs,
    ScheduleArgs,
    ServerConfig,
)
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import (
    AdapterCopied,
    AdapterImage,
    AdapterStaged,
    ChildFailed,
    ChildReady,
    CopyAdapter,
    DropAdapter,
    LoadJob,
    SchedulerToWorker,
    Shutdown,
    StageAdapter,
    WorkerFailed,
    WorkerReady,
    WorkerToScheduler,
    pack_i32,
    unpack_i32,
)
from manylora.runtime.plan import ForwardBatch, ForwardOutput
from manylora.runtime.sampling_params import SamplingParams
from tests.reference import Reference
from tests.tiny_models import VOCAB_SIZE, TinyModels
from tests.tp_worker.plan_driver import NUM_SLOTS, PAGE_SIZE, Driver

WAIT_MS = 60_000
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [0, 17, 43, 99, 250, 17, 8, 301, 64]
FIRST_ADAPTER_PAGE = 100  # the driver deals out lower ones
Message = TypeVar("Message")


class Workers:
    """The ranks of one server and the scheduler's ends of their pipes."""

    def __init__(self, context: zmq.Context[Any], config: ServerConfig) -> None:
        ranks = range(config.parallel.tp_size)
        self.pipes: list[Pipe[SchedulerToWorker, WorkerToScheduler]] = [
            Pipe(
                context,
                pipe_address(config.run_dir, f"worker{rank}"),
                bind=True,
                sends=SchedulerToWorker,
                receives=WorkerToScheduler,
            )
            for rank in ranks
        ]
        self.children = [
            ChildProcess(context, config, f"worker{rank}", "manylora.tp_worker.worker", args=[str(rank)])
            for rank in ranks
        ]

    def send(self, message: SchedulerToWorker) -> None:
        for pipe in self.pipes:
            pipe.send(message)

    def receive(self, rank: int, kind: type[Message]) -> Message:
        """The next message of this rank, which must be of this kind."""
        assert self.pipes[rank].wait(WAIT_MS)
        message = self.pipes[rank].recv()
        assert isinstance(message, kind), message
        return message

    def from_all(self, kind: type[Message]) -> list[Message]:
        return [self.receive(rank, kind) for rank in range(len(self.pipes))]

    def run(self, plan: ForwardBatch) -> list[int]:
        self.send(plan)
        return unpack_i32(self.receive(0, ForwardOutput).tokens).tolist()

    def exit_codes(self) -> list[int]:
        """Once all have ended by themselves."""
        for child in self.children:
            os.waitid(os.P_PIDFD, child.pidfd, os.WEXITED | os.WNOWAIT)
            child.reap()
        return [child.exit_code for child in self.children]

    def close(self) -> None:
        for child in self.children:
            child.reap()
            child.close()
        for pipe in self.pipes:
            pipe.close()


Start = Callable[..., Workers]


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """Short enough for a socket's name."""
    with tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as path:
        yield Path(path)


@pytest.fixture
def start(run_dir: Path) -> Iterator[Callable[[ServerConfig], Workers]]:
    with zmq.Context() as context:
        started: list[Workers] = []

        def start(config: ServerConfig) -> Workers:
            started.append(Workers(context, config))
            return started[-1]

        yield start
        for workers in started:
            workers.close()


def server_config(
    model_dir: Path, run_dir: Path, *, tp_size: int = 1, sharding: LoRASharding = "slora"
) -> ServerConfig:
    return ServerConfig(
        model=ModelArgs(model_path="m", model_dir=str(model_dir), device="cpu", dtype="float32"),
        lora=LoRAArgs(enable_lora=True, sharding=sharding),
        cache=CacheArgs(page_size=PAGE_SIZE, host_fraction=0.001),
        schedule=ScheduleArgs(max_running_requests=NUM_SLOTS),
        parallel=ParallelArgs(tp_size=tp_size),
        run_dir=str(run_dir),
        shm_dir=str(run_dir),
        supervisor_pid=os.getpid(),
    )


@pytest.mark.parametrize(("tp_size", "sharding"), [(1, "slora"), (2, "slora"), (2, "replicated")])
def test_an_adapter_is_staged_copied_and_answers_beside_the_base_model(
    tiny_models: TinyModels, run_dir: Path, start: Start, tp_size: int, sharding: LoRASharding
) -> None:
    model_dir, adapter_dir = tiny_models.model("llama"), tiny_models.adapter("llama", "r24_odd")
    config = server_config(model_dir, run_dir, tp_size=tp_size, sharding=sharding)
    workers = start(config)
    image = Loader(config).handle(LoadJob(1, str(adapter_dir)))
    assert isinstance(image, AdapterImage)
    ready = workers.from_all(WorkerReady)
    assert [message.tp_rank for message in ready] == list(range(tp_size))
    assert min(message.num_host_pages for message in ready) >= image.num_pages
    assert [child.pipe.wait(WAIT_MS) and child.pipe.recv() for child in workers.children] == [
        ChildReady()
    ] * tp_size

    workers.send(StageAdapter(7, image.path, image.ranks, image.scalings, pack_i32(range(image.num_pages))))
    assert workers.from_all(AdapterStaged) == [AdapterStaged(rank, 7) for rank in range(tp_size)]
    pages = [FIRST_ADAPTER_PAGE + 3 * page for page in range(image.num_pages)]
    slices = [11 - index for index in range(image.num_slices)]
    workers.send(CopyAdapter(7, pack_i32(pages), pack_i32(slices)))
    assert workers.from_all(AdapterCopied) == [AdapterCopied(rank, 7) for rank in range(tp_size)]
    workers.send(DropAdapter(7))  # of the host copy; the resident one stays

    driver = Driver(VOCAB_SIZE)
    driver.take_slot(2, GREEDY, PROMPT)
    driver.take_slot(4, GREEDY, PROMPT)
    adapters = {4: slices}
    drawn = [workers.run(driver.plan([(2, 0, PROMPT), (4, 0, PROMPT)], adapters=adapters))]
    for step in range(5):
        starts = {2: len(PROMPT) + step, 4: len(PROMPT) + step}
        drawn.append(workers.run(driver.decode(starts, adapters)))
    reference = Reference(model_dir)
    assert [base for base, _ in drawn] == reference.generate(None, PROMPT, 6).tokens
    assert [adapted for _, adapted in drawn] == reference.generate(adapter_dir, PROMPT, 6).tokens

    workers.send(Shutdown())
    assert workers.exit_codes() == [0] * tp_size
    assert [pipe.recv() for pipe in workers.pipes] == [None] * tp_size


def test_an_image_that_cannot_be_read_is_an_answer_and_not_the_end(
    tiny_models: TinyModels, run_dir: Path, start: Start
) -> None:
    workers = start(server_config(tiny_models.model("llama"), run_dir))
    workers.receive(0, WorkerReady)
    workers.send(
        StageAdapter(3, str(run_dir / "gone"), ((4,) * 7,) * 2, ((1.0,) * 7,) * 2, pack_i32(range(2)))
    )
    answer = workers.receive(0, AdapterStaged)
    assert answer.version == 3
    assert answer.error is not None
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(0, GREEDY, PROMPT)
    assert len(workers.run(driver.plan([(0, 0, PROMPT)]))) == 1


def test_two_plans_in_the_pipe_need_no_answer_between_them(
    tiny_models: TinyModels, run_dir: Path, start: Start
) -> None:
    workers = start(server_config(tiny_models.model("llama"), run_dir))
    workers.receive(0, WorkerReady)
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(0, GREEDY, PROMPT)
    workers.send(driver.plan([(0, 0, PROMPT)]))
    workers.send(driver.decode({0: len(PROMPT)}))
    workers.send(Shutdown())
    outputs = [workers.receive(0, ForwardOutput) for _ in range(2)]
    assert [output.step for output in outputs] == [1, 2]
    assert workers.exit_codes() == [0]


def test_a_model_without_weights_is_told_to_everybody(
    tiny_models: TinyModels, run_dir: Path, start: Start, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_bytes((tiny_models.model("llama") / "config.json").read_bytes())
    workers = start(server_config(tmp_path, run_dir))
    assert workers.receive(0, WorkerFailed).error.code == "model_not_found"
    assert workers.exit_codes() == [1]
    failed = workers.children[0].pipe.recv()
    assert isinstance(failed, ChildFailed)
    assert failed.error.code == "model_not_found"


def test_a_plan_that_cannot_be_executed_ends_the_worker(
    tiny_models: TinyModels, run_dir: Path, start: Start
) -> None:
    workers = start(server_config(tiny_models.model("llama"), run_dir))
    workers.receive(0, WorkerReady)
    driver = Driver(VOCAB_SIZE)
    driver.take_slot(NUM_SLOTS + 1, GREEDY, PROMPT)
    workers.send(driver.plan([(NUM_SLOTS + 1, 0, PROMPT)]))
    error = workers.receive(0, WorkerFailed).error
    assert error.code == "worker_crashed"
    assert "IndexError" in error.message
    assert workers.exit_codes() == [1]


def test_the_supervisor_can_stop_a_worker(tiny_models: TinyModels, run_dir: Path, start: Start) -> None:
    workers = start(server_config(tiny_models.model("llama"), run_dir))
    workers.receive(0, WorkerReady)
    workers.children[0].pipe.send(Shutdown())
    assert workers.exit_codes() == [0]
