"""The HTTP server: all routes and its limits. What the routes do is in the `*_routes.py` beside it."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from functools import partial

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from manylora.runtime.http import (
    adapter_admin_routes,
    adapter_routes,
    dashboard_routes,
    generate_routes,
    metrics_routes,
    openapi,
    server_routes,
)
from manylora.runtime.http.access import LEVELS, require_key
from manylora.runtime.http.common import MAX_BODY_BYTES, STATE, HttpState, answer_errors, check_ready
from manylora.runtime.http.connection import Connection, heed_expectation
from manylora.runtime.http.observe import RESPONSES, AccessLogger, observe
from manylora.runtime.http.openai import chat_routes, completion_routes, model_routes

logger = logging.getLogger("manylora.access")
protocol_logger = logging.getLogger("manylora.protocol")

ROUTES = (
    *generate_routes.ROUTES,
    *completion_routes.ROUTES,
    *chat_routes.ROUTES,
    *model_routes.ROUTES,
    *adapter_routes.ROUTES,
    *adapter_admin_routes.ROUTES,
    *server_routes.ROUTES,
    *metrics_routes.ROUTES,
    *openapi.ROUTES,
    *dashboard_routes.ROUTES,
)
BACKLOG = 1024  # asyncio listens again, with 128 if it is not told
KEEPALIVE_TIMEOUT_S = 75.0
SHUTDOWN_TIMEOUT_S = 3.0  # for answers on their way when the server ends


def make_app(state: HttpState) -> web.Application:
    """All routes over `state`; until it is ready every one of them answers 503."""
    app = web.Application(
        client_max_size=MAX_BODY_BYTES, middlewares=[observe, answer_errors, require_key, check_ready]
    )
    app[STATE] = state
    app[RESPONSES] = {}
    metrics_routes.install(app)
    openapi.install(app, ROUTES, state.keys)
    app[LEVELS] = {
        app.router.add_route(
            route.method, route.path, route.handler, expect_handler=heed_expectation
        ): route.access
        for route in ROUTES
    }
    return app


class _WithoutContent(logging.Filter):
    """The error of a request that is no HTTP quotes the line at fault, which may be the one with the key."""

    def filter(self, record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, HttpProcessingError):
            record.msg, record.args = f"{record.getMessage()}: {type(error).__name__}", ()
            record.exc_info = None
        return True


protocol_logger.addFilter(_WithoutContent())


@asynccontextmanager
async def serving(state: HttpState, listener: socket.socket) -> AsyncGenerator[None]:
    """Serve on a bound socket inside the block. At its end answers on their way get a short while, then connections close."""
    runner = web.AppRunner(
        make_app(state),
        handle_signals=False,
        handler_cancellation=True,  # a client that leaves cancels its route, which aborts its requests
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    assert runner.server is not None
    loop = asyncio.get_running_loop()
    connection = partial(
        Connection,
        runner.server,
        loop=loop,
        logger=protocol_logger,
        access_log=logger,
        access_log_class=AccessLogger,
        auto_decompress=False,
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
    )
    try:
        server = await loop.create_server(connection, sock=listener, backlog=BACKLOG)
        try:
            yield
        finally:
            server.close()
    finally:
        await runner.cleanup()
