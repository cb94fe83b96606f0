"""How a server comes to run: `serve` in the foreground for the command line, `launch` in a thread for `Engine`."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import msgspec

from manylora.runtime.config import HttpArgs, ServerConfig
from manylora.runtime.errors import ConfigError, ErrorInfo, WorkerCrashedError, error_from
from manylora.runtime.log import close_relay, setup_logging
from manylora.runtime.supervisor import MODULES, Supervisor

logger = logging.getLogger("manylora.launch")

_BACKLOG = 1024


def serve(config: ServerConfig) -> int:
    """Serve over HTTP until a signal or a failure. Returns the exit code: 0 after a signal, else 1 after one line."""
    setup_logging("supervisor", config.log_level, config.log_format, relay=True)
    try:
        return _serve(config)
    finally:
        close_relay()


def _serve(config: ServerConfig) -> int:
    try:
        listener = bind(config.http.host, config.http.port)
    except ConfigError as error:
        return _fail(error.info(), config)
    if config.http.is_loopback and not HttpArgs(host=listener.getsockname()[0]).is_loopback:
        listener.close()
        error = ConfigError(f"--host {config.http.host} is no loopback address here", param="host")
        return _fail(error.info(), config)
    http = msgspec.structs.replace(config.http, port=listener.getsockname()[1])
    supervisor = Supervisor(msgspec.structs.replace(config, http=http), listener)
    _stop_on_signals(supervisor)
    try:
        failure = supervisor.run()
    except (ConfigError, OSError) as error:  # no place for sockets, no more processes allowed, …
        failure = ConfigError(str(error)).info()
    return 0 if failure is None else _fail(failure, config)


class RunningServer:
    """A server without HTTP, supervised by a thread of this process; the caller plays the front.

    config: the final one: connect pipe "front" in `config.run_dir`; the first message there is ServerInfo.
    """

    def __init__(self, config: ServerConfig, supervisor: Supervisor, thread: threading.Thread) -> None:
        self.config = config
        self._supervisor = supervisor
        self._thread = thread

    def stop(self) -> None:
        """End every process and wait for it. May be called more than once."""
        if self._thread.is_alive():
            self._supervisor.stop()
        self._thread.join()


def launch(
    config: ServerConfig,
    *,
    on_failure: Callable[[ErrorInfo], None],
    modules: Mapping[str, str] = MODULES,
) -> RunningServer:
    """Start the processes of a server without HTTP; returns once the workers are loading.

    `on_failure` is called from the supervising thread if a process dies later, while loading or serving. Raises
    ConfigError (or a subclass) if the model cannot be found, is not supported, or does not suit this machine.
    """
    prepared: Future[ServerConfig] = Future()

    def failed(error: ErrorInfo) -> None:
        if prepared.done():
            on_failure(error)
        else:
            prepared.set_exception(error_from(error))

    supervisor = Supervisor(config, on_prepared=prepared.set_result, on_failure=failed, modules=modules)

    def run() -> None:
        try:
            supervisor.run()
        except BaseException as error:
            if not prepared.done():
                prepared.set_exception(error)
                return
            logger.exception("the supervisor failed")
            on_failure(WorkerCrashedError(f"the supervisor failed: {type(error).__name__}: {error}").info())

    # Children die with the thread that started them, so one thread does it all and lives as long as the server.
    thread = threading.Thread(target=run, name="manylora-supervisor", daemon=True)
    thread.start()
    try:
        return RunningServer(prepared.result(), supervisor, thread)
    except BaseException:
        if thread.is_alive():
            supervisor.stop()
        thread.join()
        raise


def bind(host: str, port: int) -> socket.socket:
    """A listening socket. ConfigError in one line if the port is taken or the host is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"--host {host} cannot be resolved: {error.strerror}", param="host") from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port in TIME_WAIT is free
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise ConfigError(f"--port {port} on {host} cannot be bound: {reason}", param="port") from error
    return listener


def _stop_on_signals(supervisor: Supervisor) -> None:
    def stop(number: int, _frame: object) -> None:
        signal.signal(number, kill)
        supervisor.stop()

    def kill(_number: int, _frame: object) -> None:
        supervisor.kill()

    signal.set_wakeup_fd(supervisor.wake_fd, warn_on_full_buffer=False)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # else it is under nohup
            signal.signal(number, stop)


def _fail(error: ErrorInfo, config: ServerConfig) -> int:
    if config.log_format == "json":
        logger.critical("%s", error.message, extra={"code": error.code, "param": error.param})
        return 1
    sys.stderr.write(f"manylora: error: {error.message}\n")
    return 1
