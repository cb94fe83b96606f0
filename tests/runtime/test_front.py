"""The front as a process of its own, between a fake scheduler and a test that plays the supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zmq

from manylora.runtime.child_process import ChildProcess
from manylora.runtime.config import ModelArgs, ServerConfig
from manylora.runtime.errors import WorkerCrashedError
from manylora.runtime.launch import bind
from manylora.runtime.messages import (
    ChildFailed,
    ChildReady,
    ChildToSupervisor,
    EngineFailed,
    Shutdown,
    Submit,
    unpack_i32,
)
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, FakeScheduler, fake_scheduler, in_loop, until
from tests.tokenizer_manager.tiny_tokenizer import BOS_ID, save_byte_level


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@dataclass
class FrontProcess:
    """A running front, with what the supervisor and the scheduler see of it, and a client."""

    child: ChildProcess
    scheduler: FakeScheduler
    client: aiohttp.ClientSession
    said: list[ChildToSupervisor] = field(default_factory=list)

    async def says(self, kind: type[ChildToSupervisor]) -> Any:
        """The next message of `kind` to the supervisor."""

        def heard() -> bool:
            self.said += self.child.pipe.drain()
            return any(isinstance(message, kind) for message in self.said)

        await until(heard)
        return next(message for message in self.said if isinstance(message, kind))

    async def status(self, path: str) -> int:
        async with self.client.get(path) as response:
            return response.status

    async def exit_code(self) -> int:
        await until(lambda: self.child.exited)
        self.child.reap()
        return self.child.exit_code


@asynccontextmanager
async def front_process(run_dir: Path) -> AsyncIterator[FrontProcess]:
    context: zmq.Context[Any] = zmq.Context()
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    config = ServerConfig(model=ModelArgs(model_path="org/base"), run_dir=str(run_dir))
    async with fake_scheduler(run_dir, context) as scheduler:
        child = ChildProcess(
            context,
            config,
            "front",
            "manylora.runtime.front",
            args=[str(listener.fileno())],
            pass_fds=[listener.fileno()],
        )
        listener.close()
        try:
            async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as client:
                yield FrontProcess(child, scheduler, client)
        finally:
            child.reap()
            child.close()
    context.term()


@in_loop
async def test_start_warms_up_and_shutdown_answers_what_waits(short_dir: Path, tokenizer_dir: Path) -> None:
    async with front_process(short_dir) as front:
        assert await front.status("/health") == 503
        front.scheduler.held = True
        await front.scheduler.announce(tokenizer_dir)
        await until(lambda: front.scheduler.running)
        assert await front.status("/v1/models") == 503  # not before the warm-up went through
        front.scheduler.held = False
        await front.says(ChildReady)
        assert await front.status("/health") == 200
        [warm_up] = [message for message in front.scheduler.received if isinstance(message, Submit)]
        assert unpack_i32(warm_up.requests[0].input_ids)[0] == BOS_ID
        assert warm_up.requests[0].params.max_new_tokens == 8
        assert warm_up.requests[0].lora_name is None

        front.scheduler.held = True
        asking = asyncio.create_task(front.client.post("/generate", json={"text": "x"}))
        await until(lambda: front.scheduler.running)
        front.child.pipe.send(Shutdown())
        response = await asking
        assert response.status == 503
        assert (await response.json())["error"]["code"] == "shutting_down"
        assert await front.exit_code() == 0
        assert not any(isinstance(message, ChildFailed) for message in front.said)


@in_loop
async def test_a_dead_engine_is_told_to_streams_too(short_dir: Path, tokenizer_dir: Path) -> None:
    async with front_process(short_dir) as front:
        await front.scheduler.announce(tokenizer_dir)
        await front.says(ChildReady)
        body = {"text": "x", "sampling_params": {"max_new_tokens": 200}, "stream": True}
        async with front.client.post("/generate", json=body) as response:
            await response.content.readline()
            front.scheduler.held = True
            error = WorkerCrashedError("process worker0 was killed by SIGKILL")
            front.child.pipe.send(EngineFailed(error.info()))
            events = (await response.text()).split("\n\n")
        assert '"code":"worker_crashed"' in events[-3]
        assert events[-2:] == ["data: [DONE]", ""]
        assert await front.exit_code() == 0


@in_loop
async def test_shutdown_while_it_starts(short_dir: Path) -> None:
    async with front_process(short_dir) as front:
        assert await front.status("/health") == 503
        front.child.pipe.send(Shutdown())
        assert await front.exit_code() == 0


@in_loop
async def test_a_tokenizer_that_cannot_be_read_ends_the_start(short_dir: Path, tmp_path: Path) -> None:
    async with front_process(short_dir) as front:
        await front.scheduler.announce(tmp_path)
        failed = await front.says(ChildFailed)
        assert failed.error.code == "model_not_found"
        assert "tokenizer.json" in failed.error.message
        assert await front.exit_code() == 1


@in_loop
async def test_a_broken_pipe_to_the_scheduler_ends_the_front(short_dir: Path, tokenizer_dir: Path) -> None:
    async with front_process(short_dir) as front:
        await front.scheduler.announce(tokenizer_dir)
        await front.says(ChildReady)
        front.scheduler.pipe.socket.send(b"garbage")
        failed = await front.says(ChildFailed)
        assert failed.error.code == "protocol_error"
        assert await front.exit_code() == 1
