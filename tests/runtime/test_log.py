"""The log: text for people, JSON for machines; in JSON every line is an object, whoever wrote it."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from manylora.runtime.log import REQUEST_ID, setup_logging
from tests.server import REPOSITORY, environment_of_a_program


@pytest.fixture
def stderr(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[], str]]:
    """What was written to stderr since the last call. How logging is set up is as before afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("manylora")
    levels = root.level, ours.level
    monkeypatch.setattr(root, "handlers", [])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.setattr(threading, "excepthook", threading.excepthook)
    yield lambda: capsys.readouterr().err
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    logging.captureWarnings(False)


def objects(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def fail() -> None:
    try:
        raise ValueError("first\nsecond")
    except ValueError:
        logging.getLogger("manylora.x").exception("it failed")


def test_an_object_has_time_process_level_and_the_callers_fields(stderr: Callable[[], str]) -> None:
    setup_logging("front", "info", "json")
    logging.getLogger("manylora.x").info("%d of %s", 3, "four", extra={"lora_name": "a\nb", "steps": 3})
    logging.getLogger("manylora.x").debug("not this")
    [line] = objects(stderr())
    assert line.pop("time").endswith("Z")
    assert line == {
        "process": "front",
        "level": "info",
        "logger": "manylora.x",
        "event": "3 of four",
        "lora_name": "a\nb",
        "steps": 3,
    }


def test_an_exception_is_one_line_with_its_traceback(stderr: Callable[[], str]) -> None:
    setup_logging("front", "info", "json")
    fail()
    [line] = objects(stderr())
    assert (line["level"], line["event"]) == ("error", "it failed")
    assert line["exception"].startswith("Traceback")
    assert line["exception"].endswith("ValueError: first\nsecond")


def test_nothing_that_is_logged_breaks_a_line(stderr: Callable[[], str]) -> None:
    setup_logging("front", "info", "json")
    logger = logging.getLogger("manylora.x")
    logger.info("a lone surrogate \ud800, a line\nand \x00", extra={"value": object(), "event": "mine"})
    [line] = objects(stderr())
    assert line["event"] == "a lone surrogate \ud800, a line\nand \x00"
    assert line["value"].startswith("<object")


@pytest.mark.parametrize("log_format", ["text", "json"])
def test_lines_about_a_request_carry_its_id(stderr: Callable[[], str], log_format: Any) -> None:
    setup_logging("front", "info", log_format)
    token = REQUEST_ID.set("my\nid")
    logging.getLogger("manylora.x").info("here")
    REQUEST_ID.reset(token)
    logging.getLogger("manylora.x").info("there")
    first, second = stderr().splitlines()
    if log_format == "json":
        assert json.loads(first)["request_id"] == "my\nid"
        assert "request_id" not in json.loads(second)
    else:
        assert first.endswith(" front] here (request 'my\\nid')")
        assert second.endswith(" front] there")


STRAY = r"""
import faulthandler, logging, os, subprocess, sys, threading, warnings
from manylora.runtime.log import close_relay, setup_logging
setup_logging("main", "info", sys.argv[1], relay=True)
logging.getLogger("manylora.x").info("mine")
os.write(2, b"half ")
os.write(2, b"a line\n")
os.write(2, b"0%\r50%\r100%\n")
os.write(2, b'{"process":"child"}\n[1]\n\xff\n')
warnings.warn("beware")
subprocess.run([sys.executable, "-c", "import sys; print('from a child', file=sys.stderr); sys.exit(1 / 0)"])
child = "import faulthandler, os; faulthandler.enable(); os.abort()"
subprocess.run([sys.executable, "-c", child])
thread = threading.Thread(target=lambda: 1 / 0, name="busy")
thread.start()
thread.join()
close_relay()
raise SystemExit(3) if sys.argv[2] == "exit" else KeyError("the end")
"""


def run_stray(log_format: str, end: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", STRAY, log_format, end],
        env=environment_of_a_program(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=60,
        check=False,
    )


def test_what_others_write_to_stderr_becomes_objects() -> None:
    done = run_stray("json", "die")
    assert (done.returncode, done.stdout) == (1, "")
    lines = objects(done.stderr)
    assert lines[0]["event"] == "mine"
    stray = [line for line in lines if line.get("logger", "stderr") == "stderr"]
    events = [line.get("event", line) for line in stray]
    assert events[:5] == ["half a line", "100%", {"process": "child"}, "[1]", "\\xff"]
    assert "from a child" in events
    assert "ZeroDivisionError: division by zero" in events  # of the child, line by line
    assert any("Fatal Python error: Aborted" in event for event in events)
    [warning] = [line for line in lines if line.get("logger") == "py.warnings"]
    assert "beware" in warning["event"]
    [in_thread] = [line for line in lines if line.get("event") == "uncaught error in thread busy"]
    assert "ZeroDivisionError" in in_thread["exception"]
    last = lines[-1]
    assert (last["level"], last["event"]) == ("critical", "uncaught error")
    assert "KeyError: 'the end'" in last["exception"]


def test_text_lets_stderr_alone() -> None:
    done = run_stray("text", "exit")
    assert done.returncode == 3
    assert done.stderr.splitlines()[0].endswith(" main] mine")
    assert "half a line\n" in done.stderr
    assert "\nfrom a child\n" in done.stderr
