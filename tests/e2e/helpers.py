"""What several end-to-end tests do: requests that run in the background, and waiting for a fact."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.server import Reply, Server

# For fixtures and tests that run on the CPU everywhere and on GPUs where there are any.
ONE_DEVICE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
TWO_DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.multigpu)]


def wait_until(fact: Callable[[], bool], what: str, timeout_s: float = 20.0) -> None:
    """Poll until `fact()`; AssertionError naming `what` if it does not come."""
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, f"{what}: not after {timeout_s} s"
        time.sleep(0.02)


def load_by_next_loader(server: Server, name: str, path: Path) -> None:
    """Load after the loader was killed. Until the scheduler has heard of that, which nobody outside sees, a load is sent to
    the dead one and answered so; a caller then asks again.
    """

    def loaded() -> bool:
        reply = server.load(name, path)
        told = (reply.status, "process that reads adapters died" in str(reply.body))
        assert told in ((200, False), (500, True)), reply
        return reply.status == 200

    wait_until(loaded, "a load by the next loader")


class Background:
    """A call in a thread of its own. `result` waits for it; `started` and `ended` are monotonic times."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.started = time.monotonic()
        self.ended = 0.0
        self._call = call
        self._result: Any = None
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def running(self) -> bool:
        return self._thread.is_alive()

    def result(self, timeout_s: float = 60.0) -> Any:
        self._thread.join(timeout_s)
        assert not self.running, f"no answer within {timeout_s} s"
        if self._error is not None:
            raise self._error
        return self._result

    def _run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self.ended = time.monotonic()


class Stream:
    """A streaming /generate that is being read in the background."""

    def __init__(self, server: Server, **body: Any) -> None:
        self.events: list[Any] = []
        self._hang_up = threading.Event()
        self._server, self._body = server, {**body, "stream": True}
        self._reader = Background(self._read)

    def wait_for_token(self) -> None:
        wait_until(lambda: bool(self.events) or not self._reader.running, "a first token")
        assert self.events, self._reader.result()

    def hang_up(self) -> None:
        """Close the connection at the next event, as a client that leaves."""
        self._hang_up.set()
        self._reader.result()

    def result(self, timeout_s: float = 60.0) -> Any:
        """The last event (an answer, or an error after tokens) or the Reply of a refusal."""
        return self._reader.result(timeout_s)

    @property
    def running(self) -> bool:
        return self._reader.running

    def _read(self) -> Any:
        with self._server.open("POST", "/generate", self._body) as response:
            if response.status != 200:
                return Reply(response.status, json.loads(response.read()), dict(response.getheaders()))
            for line in response:
                if self._hang_up.is_set() or line.strip() == b"data: [DONE]":
                    break
                if line.strip():
                    self.events.append(json.loads(line.removeprefix(b"data: ")))
            return self.events[-1]
