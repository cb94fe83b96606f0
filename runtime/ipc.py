"""One ZeroMQ pipe per pair of processes: typed, ordered, checked, never blocking.

A `Pipe` is one end of a PAIR over `ipc://`. Each frame is a 16-byte header (epoch, sequence) and one msgpack message of
the declared union. A gap, a foreign epoch or an undecodable frame raises `ProtocolError`; a full pipe raises too: the
peer is gone or stuck, and waiting would hide it (docs/architecture.md).
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from manylora.runtime.errors import ProtocolError

Out = TypeVar("Out")
In = TypeVar("In")

_HEADER = struct.Struct("<QQ")
HIGH_WATER_MARK = 16384  # messages; a live peer is never this far behind


def pipe_address(run_dir: str | Path, name: str, epoch: int = 0) -> str:
    """The address of pipe `name`; a restarted peer gets a new epoch and so a fresh address."""
    return f"ipc://{Path(run_dir) / f'{name}.{epoch}'}"


class Pipe(Generic[Out, In]):
    """One end of a pipe that sends `Out` and receives `In`.

    Both are msgspec tagged Structs or unions of them. `bind` is true at exactly one end. Not thread-safe.
    """

    def __init__(
        self,
        context: zmq.Context[Any],
        address: str,
        *,
        bind: bool,
        sends: Any,
        receives: Any,
        epoch: int = 0,
    ) -> None:
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[In] = msgspec.msgpack.Decoder(receives, strict=True)
        self._sends = sends
        self._epoch = epoch
        self._sent = 0
        self._received = 0
        self.address = address
        self.socket: zmq.Socket[bytes] = context.socket(zmq.PAIR)
        self.socket.set_hwm(HIGH_WATER_MARK)
        self.socket.setsockopt(zmq.LINGER, 500)  # ms: a last word ("failed: …") may still leave
        if bind:
            self.socket.bind(address)
        else:
            self.socket.connect(address)

    def fileno(self) -> int:
        """For an event loop: readable when `recv` *may* have something (edge-triggered: drain it)."""
        return int(self.socket.getsockopt(zmq.FD))  # type: ignore[arg-type]

    def send(self, message: Out) -> None:
        """Queue one message. Raises ProtocolError if the pipe is full."""
        self.send_encoded(self.encode(message))

    def encode(self, message: Out) -> bytes:
        """One message as `send_encoded` takes it: encode once what goes to every worker."""
        return self._encoder.encode(message)

    def send_encoded(self, body: bytes) -> None:
        """`send` of an already encoded message."""
        header = _HEADER.pack(self._epoch, self._sent)
        try:
            self.socket.send(header + body, flags=zmq.NOBLOCK)
        except zmq.Again as error:
            raise ProtocolError(f"pipe {self.address} is full after {self._sent} messages") from error
        self._sent += 1

    def recv(self) -> In | None:
        """The next message, or None if there is none now."""
        try:
            frame = self.socket.recv(flags=zmq.NOBLOCK)
        except zmq.Again:
            return None
        return self._decode(frame)

    def drain(self) -> list[In]:
        """Every message that is here now, in order."""
        messages: list[In] = []
        while (message := self.recv()) is not None:
            messages.append(message)
        return messages

    def wait(self, timeout_ms: int | None = None) -> bool:
        """Block until a message is here (True) or the time is over (False)."""
        return bool(self.socket.poll(timeout_ms, zmq.POLLIN))

    def close(self) -> None:
        self.socket.close()

    def _decode(self, frame: bytes) -> In:
        if len(frame) < _HEADER.size:
            raise ProtocolError(f"pipe {self.address}: a frame of {len(frame)} bytes")
        epoch, sequence = _HEADER.unpack_from(frame)
        if epoch != self._epoch or sequence != self._received:
            raise ProtocolError(
                f"pipe {self.address}: expected epoch {self._epoch} message {self._received}, "
                f"got epoch {epoch} message {sequence}"
            )
        self._received += 1
        try:
            return self._decoder.decode(memoryview(frame)[_HEADER.size :])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise ProtocolError(
                f"pipe {self.address}: message {sequence} does not decode: {error}"
            ) from error
