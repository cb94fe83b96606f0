"""What is noted of every HTTP request, whatever its route: a count by route and status, and a line in the log."""

from __future__ import annotations

import logging

from aiohttp import web
from aiohttp.abc import AbstractAccessLogger
from aiohttp.typedefs import Handler

from manylora.runtime.log import REQUEST_ID

RESPONSES = web.AppKey(
    "responses", dict[tuple[str, str, str], int]
)  # (handler, method, status class) -> how many
_METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"))
_ASKED_ALL_DAY = frozenset(("/metrics", "/health", "/v1/adapters"))  # by machines, and by the dashboard
_ID = web.RequestKey("request_id", str)


@web.middleware
async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Outermost: counts what the client gets. Lines that are logged meanwhile carry the request's id once it has one."""
    REQUEST_ID.set("")
    status = "cancelled"
    try:
        response = await handler(request)
        status = f"{response.status // 100}xx"
        return response
    finally:
        request[_ID] = REQUEST_ID.get()
        method = request.method if request.method in _METHODS else "other"
        key = (_route(request), method, status)
        responses = request.app[RESPONSES]
        responses[key] = responses.get(key, 0) + 1


class AccessLogger(AbstractAccessLogger):
    """One line per request, when its answer has been sent."""

    def log(self, request: web.BaseRequest, response: web.StreamResponse, time: float) -> None:
        http = f"HTTP/{request.version.major}.{request.version.minor}"
        quiet = request.method == "GET" and request.path in _ASKED_ALL_DAY and response.status < 400
        self.logger.log(
            logging.DEBUG if quiet else logging.INFO,
            '%s - "%s %s %s" %s',
            request.remote,
            request.method,
            request.path_qs.partition("?")[0],  # a query may hold what is nobody's business
            http,
            response.status,
            extra={
                "remote": request.remote,
                "method": request.method,
                "path": request.path,
                "status": response.status,
                "duration_s": round(time, 6),
                "request_id": request.get(_ID, ""),
            },
        )


def _route(request: web.Request) -> str:
    """The path of the route as it was declared; strangers' paths are not told apart."""
    resource = request.match_info.route.resource
    return "other" if resource is None else resource.canonical
