"""A real server in a subprocess and a small client: what the end-to-end tests are made of."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
# A tiny model would take the whole device and pin gigabytes of the host's memory: slow, and two servers do not fit.
CUDA_FLAGS = ("--mem-fraction-static", "0.1", "--host-fraction", "0.02")


@dataclass(frozen=True)
class Reply:
    """An HTTP answer; `body` is decoded if it is JSON, else text."""

    status: int
    body: Any
    headers: dict[str, str]


class Server:
    """`python -m manylora.launch_server …` as the leader of a session of its own. Use `running_server` to get one.

    key: sent with every request; may be changed between them.
    """

    def __init__(self, args: Sequence[str], log_path: Path, key: str | None = None) -> None:
        self.port = free_port()
        self.key = key
        self.log_path = log_path
        self._shm_dirs: set[Path] = set()
        self.run_dir_base = Path(tempfile.mkdtemp(prefix="mlt-", dir="/tmp"))  # short: it will hold sockets
        environment = {**environment_of_a_program(), "XDG_RUNTIME_DIR": str(self.run_dir_base)}
        with log_path.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "manylora.launch_server", "--port", str(self.port), *args],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                cwd=REPOSITORY,
                start_new_session=True,
            )

    # ---- life -----------------------------------------------------------------------------------------------------

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Poll /v1/models as the seeds' launcher does. Raises AssertionError with the log's end."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server exited with {self.process.returncode}:\n{self.log_tail()}")
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.get("/v1/models", timeout_s=2).status == 200:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the server was not ready after {timeout_s} s:\n{self.log_tail()}")

    def signal(self, number: int) -> None:
        self._note_shm_dirs()
        self.process.send_signal(number)

    def wait_exit(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """The exit code. Raises AssertionError with the log's end if it does not come."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the server did not exit within {timeout_s} s:\n{self.log_tail()}"
            ) from None

    def stop(self) -> int:
        """SIGTERM, and the exit code; SIGKILL to every process of the session if that does not help."""
        self._note_shm_dirs()
        try:
            if self.process.poll() is None:
                self.signal(signal.SIGTERM)
            return self.wait_exit()
        finally:
            for pid in session_members(self.process.pid):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.process.wait()
            with contextlib.suppress(OSError):  # not empty: `leftovers` tells
                self.run_dir_base.rmdir()

    def leftovers(self) -> list[str]:
        """What a stopped server should not have left: processes of its session, its files, its shared memory."""
        found = [f"process {pid}: {command}" for pid, command in session_members(self.process.pid).items()]
        paths = [*self.run_dir_base.rglob("*"), *(path for path in self._shm_dirs if path.exists())]
        return found + [str(path) for path in paths]

    def _note_shm_dirs(self) -> None:
        """Learn from the config that a child was given where its shared memory lies."""
        for path in self.run_dir_base.glob("manylora-*/*.json"):
            with contextlib.suppress(OSError):  # the server is ending
                self._shm_dirs.add(Path(json.loads(path.read_text())["shm_dir"]))

    def children(self) -> dict[str, int]:
        """Role -> pid of the supervisor's children."""
        roles: dict[str, int] = {}
        for pid, command in session_members(self.process.pid).items():
            if match := re.search(r"/(\w+)\.\d+\.json", command):
                roles[match[1]] = pid
        return roles

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def log_tail(self, lines: int = 60) -> str:
        """The end of the log, without the polls of a start."""
        kept = [line for line in self.log().splitlines() if not line.endswith("503")]
        return "\n".join(kept[-lines:])

    # ---- client ---------------------------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def request(self, method: str, path: str, body: Any = None, *, timeout_s: float = 120.0) -> Reply:
        """One request on a connection of its own. `body`: bytes as they are, anything else as JSON."""
        with self.open(method, path, body, timeout_s=timeout_s) as response:
            raw, headers = response.read(), dict(response.getheaders())
        text = raw.decode()
        is_json = "json" in headers.get("Content-Type", "")
        return Reply(response.status, json.loads(text) if is_json else text, headers)

    @contextmanager
    def open(
        self, method: str, path: str, body: Any = None, *, timeout_s: float = 120.0
    ) -> Iterator[http.client.HTTPResponse]:
        """The response before its body was read; leaving the block closes the connection."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"} if data else {}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        try:
            connection.request(method, path, data, headers)
            response = connection.getresponse()
            with response:
                yield response
        finally:
            connection.close()

    def get(self, path: str, *, timeout_s: float = 60.0) -> Reply:
        return self.request("GET", path, timeout_s=timeout_s)

    def post(self, path: str, body: Any, *, timeout_s: float = 120.0) -> Reply:
        return self.request("POST", path, body, timeout_s=timeout_s)

    def generate(self, **body: Any) -> Any:
        """The JSON of a /generate that must succeed."""
        reply = self.post("/generate", body)
        assert reply.status == 200, f"{reply.status}: {reply.body}"
        return reply.body

    def stream(self, **body: Any) -> Iterator[Any]:
        """The events of a streaming /generate; the last must be [DONE]."""
        with self.open("POST", "/generate", {**body, "stream": True}) as response:
            assert response.status == 200, response.read()
            assert response.headers["Content-Type"].startswith("text/event-stream")
            yield from sse_events(response)

    def load(self, name: str, path: Path, **options: Any) -> Reply:
        return self.post("/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **options})

    def unload(self, name: str) -> Reply:
        return self.post("/unload_lora_adapter", {"lora_name": name})

    def ledger(self) -> dict[str, Any]:
        """The scheduler's accounts, as /get_server_info tells them."""
        reply = self.get("/get_server_info")
        assert reply.status == 200, reply
        [state] = reply.body["internal_states"]
        return state

    def wait_idle(self, timeout_s: float = 30.0) -> dict[str, Any]:
        """The ledger once nothing runs or waits."""
        deadline = time.monotonic() + timeout_s
        while True:
            ledger = self.ledger()
            if not (ledger["running"] or ledger["waiting"] or ledger["leases"]):
                return ledger
            assert time.monotonic() < deadline, f"not idle after {timeout_s} s: {ledger}"
            time.sleep(0.05)


@contextmanager
def running_server(
    model_dir: Path | str, *args: Any, log_dir: Path, device: str = "cpu", key: str | None = None
) -> Iterator[Server]:
    """A ready server, stopped at the end: it must then exit with 0 and leave nothing. `key`: one it knows."""
    flags = CUDA_FLAGS if device == "cuda" else ()
    command = ["--model-path", str(model_dir), "--device", device, *flags, *(str(arg) for arg in args)]
    server = Server(command, log_dir / f"server-{time.monotonic_ns()}.log", key)
    try:
        server.wait_ready()
        yield server
    finally:
        code = server.stop()
    assert code == 0, f"exit code {code}:\n{server.log_tail()}"
    assert not server.leftovers()
    assert "waited for a kernel to be compiled" not in server.log(), server.log_tail()


def sse_events(response: http.client.HTTPResponse) -> Iterator[Any]:
    """The JSON of each `data:` line up to [DONE]. Raises AssertionError if the stream ends without."""
    for line in response:
        if line.strip():
            assert line.startswith(b"data: "), line
            data = line[len(b"data: ") :].strip()
            if data == b"[DONE]":
                return
            yield json.loads(data)
    raise AssertionError("the stream ended without [DONE]")


def environment_of_a_program() -> dict[str, str]:
    """This process's environment, for a Python that shall import the tree under test."""
    inherited = os.environ.get("PYTHONPATH")
    path = [str(REPOSITORY / ".pkg"), *([inherited] if inherited else [])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def session_members(session: int) -> dict[int, str]:
    """pid -> command line of every live process of a session."""
    members: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            after_name = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        state, member_of = after_name[0], int(after_name[3])
        if member_of == session and state != "Z":
            members[int(entry.name)] = command
    return members
