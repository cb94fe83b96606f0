"""The HTTP server: all routes and its limits. What the routes do is in the `*_routes.py` beside it."""

from __future__ import annotations

import logging
import socket
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from aiohttp import web

from manylora.runtime.http import adapter_routes, generate_routes, server_routes
from manylora.runtime.http.common import MAX_BODY_BYTES, STATE, HttpState, answer_errors
from manylora.runtime.http.openai import chat_routes, completion_routes, model_routes

logger = logging.getLogger("manylora.access")

ROUTES = (
    *generate_routes.ROUTES,
    *completion_routes.ROUTES,
    *chat_routes.ROUTES,
    *model_routes.ROUTES,
    *adapter_routes.ROUTES,
    *server_routes.ROUTES,
)
BACKLOG = 1024  # asyncio listens again, with 128 if it is not told
KEEPALIVE_TIMEOUT_S = 75.0
SHUTDOWN_TIMEOUT_S = 3.0  # for answers on their way when the server ends


def make_app(state: HttpState) -> web.Application:
    """All routes over `state`; until it is ready every one of them answers 503."""
    app = web.Application(client_max_size=MAX_BODY_BYTES, middlewares=[answer_errors])
    app[STATE] = state
    for route in ROUTES:
        app.router.add_route(route.method, route.path, route.handler)
    return app


@asynccontextmanager
async def serving(state: HttpState, listener: socket.socket) -> AsyncGenerator[None]:
    """Serve on a bound socket inside the block. At its end answers on their way get a short while, then connections close."""
    runner = web.AppRunner(
        make_app(state),
        access_log=logger,
        access_log_format='%a - "%r" %s',
        auto_decompress=False,
        handle_signals=False,
        handler_cancellation=True,  # a client that leaves cancels its route, which aborts its requests
        keepalive_timeout=KEEPALIVE_TIMEOUT_S,
        shutdown_timeout=SHUTDOWN_TIMEOUT_S,
    )
    await runner.setup()
    try:
        await web.SockSite(runner, listener, backlog=BACKLOG).start()
        yield
    finally:
        await runner.cleanup()
