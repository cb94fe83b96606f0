"""A server of fakes: every role is this module, which writes down what happens to it and misbehaves on request.

`$FAKE_LOG` is the file it writes to; `$FAKE_<ROLE>` what the role does once it has started (see `behave`).
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path

import msgspec

from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ConfigError
from manylora.runtime.ipc import Pipe, pipe_address
from manylora.runtime.messages import ChildReady, EngineFailed, LoaderRestarted, Prepared, Shutdown

ROLES = ("front", "prepare", "scheduler", "loader", "worker")
MODULES: dict[str, str] = dict.fromkeys(ROLES, "tests.runtime.fake_server")


def note(text: str) -> None:
    descriptor = os.open(os.environ["FAKE_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.write(descriptor, f"{text}\n".encode())
    os.close(descriptor)


def behave(behaviour: str, config: ServerConfig, context: ChildContext) -> None:
    match behaviour:
        case "serve" | "complain":  # at its end
            context.ready()
        case "load":  # for ever
            pass
        case "end":
            context.close()
            os._exit(0)
        case "refuse":
            raise ConfigError(f"{context.role} refuses")
        case "die-once" if config.epoch > 0:
            context.ready()
        case "die" | "die-once":
            context.ready()
            while not (Path(config.run_dir) / "die").exists():
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGKILL)
        case "ignore":
            context.ready()
            time.sleep(3600)


def obey(context: ChildContext) -> None:
    """Until told to end: the front and the scheduler by the supervisor, the others by the scheduler."""
    while True:
        context.supervisor.wait()
        message = context.supervisor.recv()
        match message:
            case Shutdown():
                note(f"{context.role} was told to end")
                return
            case EngineFailed():
                note(f"{context.role} was told: {message.error.message}")
                return
            case LoaderRestarted():
                note(f"{context.role} was told of loader {message.epoch}")
            case _:
                pass


def obey_scheduler(context: ChildContext) -> None:
    pipe = context.connect(context.role, sends=ChildReady, receives=Shutdown)
    pipe.send(ChildReady())
    pipe.wait()
    note(f"{context.role} was told to end")
    pipe.close()


def end_the_others(config: ServerConfig, context: ChildContext) -> None:
    for role in ("loader", *(f"worker{rank}" for rank in range(config.parallel.tp_size))):
        address = pipe_address(config.run_dir, role)
        pipe = Pipe(context.zmq, address, bind=True, sends=Shutdown, receives=ChildReady)
        if pipe.wait(500):
            pipe.send(Shutdown())
        pipe.close()
    context.zmq.term()


def main(config: ServerConfig, context: ChildContext) -> None:
    note(f"{context.role} {config.epoch} started")
    if context.role == "front":
        listener = socket.socket(fileno=int(context.args[0]))
        assert listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    behaviour = os.environ.get(f"FAKE_{context.role.upper()}", "serve")
    if context.role == "prepare" and behaviour == "serve":
        model = msgspec.structs.replace(config.model, model_dir="/prepared")
        context.supervisor.send(Prepared(msgspec.structs.replace(config, model=model)))
        return
    if context.role not in ("front", "prepare"):
        assert config.model.model_dir == "/prepared"
    behave(behaviour, config, context)
    if context.role in ("front", "scheduler", "prepare"):
        obey(context)
    else:
        obey_scheduler(context)
    if context.role == "scheduler":
        end_the_others(config, context)
    if behaviour == "complain":
        raise ConfigError(f"{context.role} complains")


if __name__ == "__main__":
    run_child(Path(sys.argv[1]).name.split(".")[0], sys.argv[1:], main)
