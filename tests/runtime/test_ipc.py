"""The pipe between two processes: order, and a fault for everything that breaks it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from manylora.runtime import ipc
from manylora.runtime.errors import ProtocolError
from manylora.runtime.ipc import Pipe, pipe_address


class Ping(msgspec.Struct, frozen=True, tag=True):
    number: int


class Pong(msgspec.Struct, frozen=True, tag=True):
    text: str


Message = Ping | Pong


class Ends:
    """Both ends of one pipe, and a peer that may say anything in place of the far one."""

    def __init__(self, context: zmq.Context[Any], run_dir: Path) -> None:
        self._context = context
        self._address = pipe_address(run_dir, "p")
        self._sockets: list[zmq.Socket[bytes]] = []

    def open(self, *, bind: bool) -> Pipe[Any, Any]:
        pipe: Pipe[Any, Any] = Pipe(self._context, self._address, bind=bind, sends=Message, receives=Message)
        self._sockets.append(pipe.socket)
        return pipe

    def say(self, *frames: bytes) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.PAIR)
        self._sockets.append(socket)
        socket.connect(self._address)
        for frame in frames:
            socket.send(frame)

    def close(self) -> None:
        for socket in self._sockets:
            socket.close(linger=0)


@pytest.fixture
def ends(short_dir: Path) -> Iterator[Ends]:
    with zmq.Context() as context:
        ends = Ends(context, short_dir)
        yield ends
        ends.close()


def frame(message: object, sequence: int = 0, epoch: int = 0) -> bytes:
    return ipc._HEADER.pack(epoch, sequence) + msgspec.msgpack.encode(message)


def receive(pipe: Pipe[Any, Any], count: int) -> list[Message]:
    received: list[Message] = []
    while len(received) < count:
        assert pipe.wait(2000)
        message = pipe.recv()
        received += [message] if message is not None else []
    return received


def test_messages_arrive_in_order_and_typed(ends: Ends) -> None:
    ours, theirs = ends.open(bind=True), ends.open(bind=False)
    theirs.send(Ping(1))
    theirs.send_encoded(theirs.encode(Pong("zwei")))
    theirs.send(Ping(3))
    assert receive(ours, 3) == [Ping(1), Pong("zwei"), Ping(3)]
    assert ours.recv() is None
    assert not ours.wait(0)


@pytest.mark.parametrize(
    ("broken", "complaint"),
    [
        (b"short", "a frame of 5 bytes"),
        (frame(Ping(1), sequence=1), "expected epoch 0 message 0, got epoch 0 message 1"),
        (frame(Ping(1), epoch=7), "expected epoch 0 message 0, got epoch 7 message 0"),
        (ipc._HEADER.pack(0, 0), "message 0 does not decode"),
        (ipc._HEADER.pack(0, 0) + b"\xc1", "message 0 does not decode"),
        (ipc._HEADER.pack(0, 0) + b"\x91" * 100_000, "message 0 does not decode"),
        (frame({"type": "Ping", "number": "1"}), "message 0 does not decode"),
        (frame({"type": "Pang"}), "message 0 does not decode"),
    ],
    ids=["short", "gap", "epoch", "empty", "garbage", "deep", "wrong type", "unknown tag"],
)
def test_a_broken_frame_is_a_fault(ends: Ends, broken: bytes, complaint: str) -> None:
    ours = ends.open(bind=True)
    ends.say(broken)
    assert ours.wait(2000)
    with pytest.raises(ProtocolError, match=complaint):
        ours.recv()


def test_a_gap_is_a_fault(ends: Ends) -> None:
    ours = ends.open(bind=True)
    ends.say(frame(Ping(0)), frame(Ping(2), sequence=2))
    with pytest.raises(ProtocolError, match="expected epoch 0 message 1, got epoch 0 message 2"):
        receive(ours, 2)


def test_a_full_pipe_is_a_fault_and_not_a_wait(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ipc, "HIGH_WATER_MARK", 4)
    nobody_reads = ends.open(bind=False)
    for number in range(4):
        nobody_reads.send(Ping(number))
    with pytest.raises(ProtocolError, match="is full after 4 messages"):
        nobody_reads.send(Ping(4))


def test_a_peer_of_another_epoch_has_another_address(tmp_path: Path) -> None:
    assert pipe_address(tmp_path, "loader", 1) == f"ipc://{tmp_path}/loader.1"
    assert pipe_address(tmp_path, "loader", 1) != pipe_address(tmp_path, "loader", 2)
