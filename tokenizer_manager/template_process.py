"""The process that renders chat templates: `python template_process.py <socket fd>`.

Templates come with models, so they are programs of strangers. Here one can neither touch the server's objects nor run for
long: the kernel ends the process when a render exceeds its time, whatever it is doing, and the next chat gets a new one.
Started by path, so that it needs nothing of ours. Frames are a 4-byte length and one msgpack value: first `Setup`, then
`Chat` after `Chat`, each answered by `Rendered`.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import sys
from collections.abc import Mapping
from datetime import datetime
from typing import Any, NoReturn

import msgspec
from jinja2 import Template, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import Node, Scope
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 1 << 30  # of address space
MAX_TEXT_BYTES = 64 << 20
LENGTH_BYTES = 4


class Setup(msgspec.Struct, frozen=True):
    """`variables`: what every render sees besides the messages (bos_token, …). `limit_s`: of one render."""

    template: str
    variables: dict[str, str]
    limit_s: float


class Chat(msgspec.Struct, frozen=True):
    messages: list[dict[str, Any]]


class Rendered(msgspec.Struct, frozen=True, omit_defaults=True):
    """`error`: what the template said instead of a text."""

    text: str = ""
    error: str = ""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said, for training; here it changes nothing."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return Scope(body, lineno=line)


def compile_template(text: str) -> Template:
    """The template in a sandbox as transformers has it. Raises jinja2.TemplateError saying what is wrong."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters |= {"tojson": _to_json}  # pyright: ignore[reportUnknownMemberType]
    environment.globals |= {  # pyright: ignore[reportUnknownMemberType]
        "raise_exception": _raise,
        "strftime_now": _strftime_now,
    }
    return environment.from_string(text)


def render(template: Template, messages: list[dict[str, Any]], variables: Mapping[str, str]) -> str:
    """The text that asks for the next answer. Raises whatever the template raises."""
    values = {"messages": messages, "tools": None, "documents": None, "add_generation_prompt": True}
    return template.render({**variables, **values})


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """jinja's own filter escapes for HTML, which no model was taught."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _read_frame(connection: socket.socket) -> bytes | None:
    """None at the end of the connection."""
    head = connection.recv(LENGTH_BYTES, socket.MSG_WAITALL)
    if len(head) < LENGTH_BYTES:
        return None
    length = int.from_bytes(head, "big")
    body = connection.recv(length, socket.MSG_WAITALL) if length else b""
    return body if len(body) == length else None


def _serve(connection: socket.socket) -> None:
    frame = _read_frame(connection)
    if frame is None:
        return
    setup = msgspec.msgpack.decode(frame, type=Setup)
    template: Template | None = None
    while (frame := _read_frame(connection)) is not None:
        chat = msgspec.msgpack.decode(frame, type=Chat)
        signal.setitimer(signal.ITIMER_REAL, setup.limit_s)  # the signal ends the process
        try:
            template = template or compile_template(setup.template)
            answer = _bounded(render(template, chat.messages, setup.variables))
        except Exception as error:  # a template may raise anything
            answer = Rendered(error=_in_words(error))
        signal.setitimer(signal.ITIMER_REAL, 0)
        body = msgspec.msgpack.encode(answer)
        connection.sendall(len(body).to_bytes(LENGTH_BYTES, "big") + body)


def _bounded(text: str) -> Rendered:
    size = len(text.encode())
    if size > MAX_TEXT_BYTES:
        return Rendered(error=f"its text has {size} bytes, more than {MAX_TEXT_BYTES}")
    return Rendered(text=text)


def _in_words(error: Exception) -> str:
    if isinstance(error, MemoryError):
        return "it needs too much memory"
    if isinstance(error, TemplateError):
        return error.message or type(error).__name__
    return f"{type(error).__name__}: {error}".encode(errors="replace").decode()


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # A connection error says that the server is gone.
    with socket.socket(fileno=int(sys.argv[1])) as connection, contextlib.suppress(ConnectionError):
        _serve(connection)


if __name__ == "__main__":
    _main()
