"""A model's chat template: where it is found, and its rendering, in a process that can be killed."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import msgspec

from manylora.runtime.errors import ChatTemplateError, ModelUnsupportedError, NoChatTemplateError
from manylora.tokenizer_manager import template_process
from manylora.tokenizer_manager.template_process import LENGTH_BYTES, Chat, Rendered, Setup

RENDER_LIMIT_S = 2.0
MAX_RENDERERS = 2  # so that one slow chat does not hold up all others

_START_LIMIT_S = 20.0  # of a process on a machine that is busy; also how long a stuck one is waited for


class ChatTemplate:
    """Turns messages into the text of a prompt. Lives in one event loop; processes start when first needed.

    Without a template every render raises NoChatTemplateError.
    """

    def __init__(
        self,
        text: str | None = None,
        variables: Mapping[str, str] | None = None,
        *,
        limit_s: float = RENDER_LIMIT_S,
    ) -> None:
        """`variables`: what the template sees besides the messages: the tokenizer's special tokens by name."""
        self.text = text
        self._setup = Setup(text or "", dict(variables or {}), limit_s)
        self._idle: list[_Renderer] = []
        self._turns = asyncio.Semaphore(MAX_RENDERERS)

    async def render(self, messages: list[dict[str, Any]]) -> str:
        """The prompt that asks for the next answer. It begins with a BOS if the template writes one.

        Raises NoChatTemplateError, or ChatTemplateError if the template refuses the messages, fails or takes too long.
        """
        if self.text is None:
            raise NoChatTemplateError(
                "The model has no chat template (chat_template in tokenizer_config.json, or chat_template.jinja); "
                "start the server with --chat-template, or use /v1/completions.",
                param="messages",
            )
        async with self._turns:
            renderer = self._take()
            try:
                rendered = await renderer.render(Chat(messages))
            except BaseException:  # cancelled too: its answer would be taken for the next one
                renderer.close()
                raise
            self._idle.append(renderer)
        if rendered.error:
            raise ChatTemplateError(f"The chat template failed: {rendered.error}", param="messages")
        return rendered.text

    def close(self) -> None:
        """End the processes. For the end of the event loop."""
        while self._idle:
            self._idle.pop().close()

    def _take(self) -> _Renderer:
        while self._idle:
            renderer = self._idle.pop()
            if renderer.alive:
                return renderer
            renderer.close()
        return _Renderer(self._setup)


class _Renderer:
    """One process and the connection to it. Not for two renders at once."""

    def __init__(self, setup: Setup) -> None:
        self._limit_s = setup.limit_s
        self._socket, theirs = socket.socketpair()
        with theirs:
            self._socket.setblocking(False)
            self._process = subprocess.Popen(
                # -P: a file beside the script must not pass for one of the modules it imports.
                [sys.executable, "-P", template_process.__file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
            )
        self._unsent = _frame(setup)

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    async def render(self, chat: Chat) -> Rendered:
        """Raises ChatTemplateError if no answer comes; then the process is of no more use."""
        loop = asyncio.get_running_loop()
        data, self._unsent = self._unsent + _frame(chat), b""
        try:
            async with asyncio.timeout(self._limit_s + _START_LIMIT_S):
                await loop.sock_sendall(self._socket, data)
                size = int.from_bytes(await self._receive(LENGTH_BYTES), "big")
                return msgspec.msgpack.decode(await self._receive(size), type=Rendered)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            self.close()
            raise ChatTemplateError(self._why_it_ended(), param="messages") from error

    def close(self) -> None:
        """End the process. May be called more than once."""
        self._socket.close()
        if self.alive:
            self._process.kill()  # one that is ending already keeps the signal it ends by
        self._process.wait()

    async def _receive(self, size: int) -> bytes:
        loop = asyncio.get_running_loop()
        data = bytearray()
        while len(data) < size:
            part = await loop.sock_recv(self._socket, size - len(data))
            if not part:
                raise EOFError
            data += part
        return bytes(data)

    def _why_it_ended(self) -> str:
        code = self._process.returncode
        if code == -signal.SIGALRM:
            return f"The chat template took longer than {self._limit_s:g} s."
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f"The process that renders the chat template ended ({how})."


def find_chat_template(directory: str | Path, path: str = "") -> str | None:
    """The template's text: of the file `path` if given, else of the tokenizer's `directory`; None if it has none.

    Raises ModelUnsupportedError for one that cannot be read.
    """
    file = Path(path) if path else Path(directory) / "chat_template.jinja"
    try:
        if path or file.exists():
            return file.read_text(encoding="utf-8")
        config_file = Path(directory) / "tokenizer_config.json"
        config: Any = json.loads(config_file.read_text(encoding="utf-8")) if config_file.exists() else None
    except (OSError, ValueError) as error:
        raise ModelUnsupportedError(f"{file} cannot be read: {error}", param="chat_template") from error
    if not isinstance(config, dict):
        return None
    return _default_template(cast("dict[str, Any]", config).get("chat_template"), config_file)


def _default_template(value: Any, file: Path) -> str | None:
    """One text, or the one named "default" of a list of {"name", "template"}."""
    if isinstance(value, list):
        entries = [cast("dict[str, Any]", one) for one in cast("list[Any]", value) if isinstance(one, dict)]
        value = next((one.get("template") for one in entries if one.get("name") == "default"), None)
    if value is not None and not isinstance(value, str):
        raise ModelUnsupportedError(
            f"{file}: chat_template is neither text nor a list of named ones", param="chat_template"
        )
    return value


def _frame(value: Setup | Chat) -> bytes:
    body = msgspec.msgpack.encode(value)
    return len(body).to_bytes(LENGTH_BYTES, "big") + body
