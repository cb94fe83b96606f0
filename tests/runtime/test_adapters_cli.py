"""`manylora adapters`: its requests, its table, its JSON, its errors and exit codes, against a real socket."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest

from manylora.runtime.adapters_cli import main

CARD = {
    "name": "org/a b",
    "version": 3,
    "path": "someone/adapter",
    "revision": "0123456789abcdef0123456789abcdef01234567",
    "digest": "d",
    "rank": 16,
    "modules": ["q_proj"],
    "bytes": 3 * 1024**2,
    "pages": 4,
    "tier": "resident",
    "pinned": True,
    "ttl_s": 7200.0,
    "running": 2,
    "waiting": 1,
    "requests": 40,
    "hits": 39,
    "loads": 1,
    "evictions": 0,
    "tokens": 512,
    "queue_s": 0.5,
    "loaded_at": 0.0,
    "last_use": None,
}


class Recorder(ThreadingHTTPServer):
    """Answers everything with `answer`, and keeps what it was asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, str, Any, str | None]] = []
        self.answer: tuple[int, bytes] = (200, json.dumps(CARD).encode())
        self.location: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Recorder  # type: ignore[assignment]

    def _answer(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = json.loads(self.rfile.read(length)) if length else None
        path = unquote(self.path)
        self.server.asked.append((self.command, path, body, self.headers.get("Authorization")))
        status, data = self.server.answer
        self.send_response(status)
        if self.server.location is not None:
            self.send_header("Location", self.server.location)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_PATCH = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Recorder]:
    with Recorder() as recorder:
        thread = threading.Thread(target=recorder.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield recorder
        recorder.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("command", "request_made"),
    [
        ("list", ("GET", "/v1/adapters", None)),
        (
            "load org/a_b p --pinned --ttl 9 --if-version 0",
            ("PUT", "/v1/adapters/org/a_b", {"path": "p", "pinned": True, "ttl_s": 9, "if_version": 0}),
        ),
        (
            "load .. p",
            ("PUT", "/v1/adapters/..", {"path": "p", "pinned": False, "ttl_s": None, "if_version": None}),
        ),
        ("unload a", ("DELETE", "/v1/adapters/a", {"drain_s": None, "force": False, "if_version": None})),
        (
            "unload a --drain 2.5 --if-version 4",
            ("DELETE", "/v1/adapters/a", {"drain_s": 2.5, "force": False, "if_version": 4}),
        ),
        (
            "unload a --force",
            ("DELETE", "/v1/adapters/a", {"drain_s": None, "force": True, "if_version": None}),
        ),
        ("pin a", ("PATCH", "/v1/adapters/a", {"pinned": True, "if_version": None})),
        ("pin a --off", ("PATCH", "/v1/adapters/a", {"pinned": False, "if_version": None})),
    ],
)
def test_each_command_is_one_request(
    server: Recorder, command: str, request_made: tuple[str, str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "list":
        server.answer = (200, json.dumps({"object": "list", "data": [CARD]}).encode())
    assert main([*command.split(), "--url", server.url + "/"]) == 0
    assert server.asked == [(*request_made, None)]
    assert "org/a b" in capsys.readouterr().out


def test_the_table_has_a_row_per_adapter_and_cuts_nothing(
    server: Recorder, capsys: pytest.CaptureFixture[str]
) -> None:
    long = {
        **CARD,
        "name": "x" * 300,
        "path": "/" + "p" * 300,
        "revision": None,
        "pinned": False,
        "ttl_s": None,
    }
    used = {**long, "name": "used", "last_use": time.time() - 600, "bytes": 17, "tier": "host"}
    server.answer = (200, json.dumps({"object": "list", "data": [CARD, long, used]}).encode())
    assert main(["list", "--url", server.url]) == 0
    heading, *rows = capsys.readouterr().out.rstrip().split("\n")
    assert heading.split()[:4] == ["NAME", "VERSION", "TIER", "RANK"]
    assert [row.split()[0] for row in rows] == ["org/a", "x" * 300, "used"]
    for words in ("resident pinned", " 16 ", "3.0 MiB", "never", "2 h", "someone/adapter@01234567"):
        assert words in rows[0]
    assert rows[1].rstrip().endswith("/" + "p" * 300)
    for words in ("host ", "17 B", "10 min ago", " - "):
        assert words in rows[2]
    assert "\x1b" not in heading + "".join(rows)


def test_json_is_what_the_server_said(server: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pin", "a", "--json", "--url", server.url]) == 0
    assert json.loads(capsys.readouterr().out) == CARD


def test_a_refusal_is_one_line_with_its_code(server: Recorder, capsys: pytest.CaptureFixture[str]) -> None:
    error = {"message": "at version 3\nnot \x1b[2J4", "type": "t", "code": "version_conflict", "param": None}
    server.answer = (409, json.dumps({"error": error}).encode())
    assert main(["load", "a", "p", "--url", server.url]) == 1
    out, err = capsys.readouterr()
    assert (out, err) == ("", "manylora adapters: error: at version 3 not \\x1b[2J4 (version_conflict)\n")


@pytest.mark.parametrize("answer", [(500, b"<html>"), (404, b'{"detail": "x"}'), (200, b"hello"), (502, b"")])
def test_what_is_no_manylora_is_no_answer(
    server: Recorder, answer: tuple[int, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    server.answer = answer
    assert main(["list", "--url", server.url]) == 3
    assert server.url in capsys.readouterr().err


def test_nobody_there_is_no_answer(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert main(["list", "--url", url]) == 3
    assert "refused" in capsys.readouterr().err


def test_a_server_that_says_nothing_is_given_up(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        assert main(["list", "--url", url, "--timeout", "0.05"]) == 3
    assert "timed out" in capsys.readouterr().err


def test_the_key_is_sent_to_the_server_alone(server: Recorder, tmp_path: Path) -> None:
    key_file = tmp_path / "keys"
    key_file.write_text("# of the admins\n\n  sesame-sesame-sesame \nanother\n")
    flags = ["--url", server.url, "--admin-key-file", str(key_file)]
    assert main(["pin", "a", *flags]) == 0
    assert server.asked[0][3] == "Bearer sesame-sesame-sesame"
    server.answer, server.location = (307, b""), f"{server.url}/elsewhere"
    assert main(["pin", "a", *flags]) == 3
    assert len(server.asked) == 2, "it followed a redirect with the key"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "frob",
        "load a",
        "load a p --ttl soon",
        "unload a --drain 1 --force",
        "pin a --of",
        "list --url ftp://host",
        "list --url http://host:port",
        "list --url nonsense",
        "list --admin-key-file /nowhere",
    ],
)
def test_a_wrong_command_line_says_why(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(command.split()) == 2
    assert "error" in capsys.readouterr().err


def test_an_empty_key_file_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("", "# nothing\n", "schlüssel\n"):
        (tmp_path / "keys").write_text(text, encoding="utf-8")
        assert main(["list", "--admin-key-file", str(tmp_path / "keys")]) == 2
        assert "key" in capsys.readouterr().err
