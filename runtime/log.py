"""Logging set-up: one format for every process, with its name. One event is one line of text, or one JSON object.

    [2026-01-01 12:00:00 front] 127.0.0.1 - "POST /generate HTTP/1.1" 200 (request 'my-request')
    {"time":"2026-01-01T12:00:00.000Z","process":"front","level":"info","logger":"manylora.access","event":"…",…}

What a caller passes as `extra` is a field of the JSON object. Text goes on in further lines after an exception, JSON never.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import threading
import time
from contextvars import ContextVar
from types import TracebackType
from typing import Any, TextIO

from manylora.runtime.config import LogFormat

# Of the request that the running task answers; "" outside of one, or before it is known.
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "request_id"}
_DRAIN_S = 0.5


def setup_logging(
    process: str, level: str = "info", log_format: LogFormat = "text", *, relay: bool = False
) -> None:
    """Log to stderr. Call once at a process's start.

    relay: in JSON, have whatever this process and those it will start write to stderr pass through here, so that every
    line there is an object. `close_relay` ends it.
    """
    global _relay
    stream: TextIO = sys.stderr
    formatter: logging.Formatter = _TextFormatter(process)
    if log_format == "json":
        formatter = json_formatter = _JsonFormatter(process)
        if relay:
            _relay = _Relay(json_formatter)
            stream = _relay.stream
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    handler.addFilter(_add_request_id)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("manylora").setLevel(level.upper())
    logging.captureWarnings(True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def close_relay() -> None:
    """Write what is still under way. For the end of a process that relays."""
    global _relay
    if _relay is not None:
        _relay.close()
        _relay = None


class _TextFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        name = process.replace("%", "%%")
        super().__init__(f"[%(asctime)s {name}] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        request_id = getattr(record, "request_id", "")
        line = super().formatMessage(record)
        return f"{line} (request {request_id!a})" if request_id else line


class _JsonFormatter(logging.Formatter):
    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """One line, whatever the record holds."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        fields: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03}Z",
            "process": self._process,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        if request_id := getattr(record, "request_id", ""):
            fields["request_id"] = request_id
        fields |= {
            name: value
            for name, value in vars(record).items()
            if name not in _STANDARD and name not in fields
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            fields["stack"] = self.formatStack(record.stack_info)
        return json.dumps(
            fields, default=str, separators=(",", ":")
        )  # in ASCII: a lone surrogate must not end it


class _Relay:
    """Stands between file descriptor 2 and the real stderr: lines that are JSON pass, others become events.

    The processes that this one starts inherit the descriptor, so it sees even what a crash writes last.
    """

    def __init__(self, formatter: _JsonFormatter) -> None:
        sys.stderr.flush()
        self._formatter = formatter
        self.stream = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace")
        read_end, write_end = os.pipe()
        os.dup2(write_end, 2)
        os.close(write_end)
        self._thread = threading.Thread(target=self._pass_on, args=(read_end,), name="stderr", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Give the descriptor back and write what is still under way."""
        sys.stderr.flush()
        os.dup2(self.stream.fileno(), 2)
        self._thread.join(_DRAIN_S)

    def _pass_on(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", errors="backslashreplace", newline="\n") as lines:
            for line in lines:
                if text := line.rstrip().rpartition("\r")[2]:  # of a progress bar the last state
                    with contextlib.suppress(OSError):  # a full disk must not end the relay
                        self.stream.write((text if _is_object(text) else self._as_event(text)) + "\n")

    def _as_event(self, text: str) -> str:
        return self._formatter.format(logging.LogRecord("stderr", logging.WARNING, "", 0, text, None, None))


_relay: _Relay | None = None


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _add_request_id(record: logging.LogRecord) -> bool:
    if not hasattr(record, "request_id"):
        record.request_id = REQUEST_ID.get()
    return True


def _log_uncaught(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, traceback)
        return
    logging.getLogger("manylora").critical("uncaught error", exc_info=(kind, error, traceback))


def _log_uncaught_in_thread(args: threading.ExceptHookArgs) -> None:
    if args.exc_value is not None and args.exc_type is not SystemExit:
        name = args.thread.name if args.thread else "?"
        logging.getLogger("manylora").critical(
            "uncaught error in thread %s", name, exc_info=(args.exc_type, args.exc_value, args.exc_traceback)
        )
