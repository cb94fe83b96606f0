"""Answers as server-sent events: what every streaming route shares."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from aiohttp import web

from manylora.runtime.errors import ManyloraError
from manylora.runtime.http.answer_types import ErrorBody
from manylora.runtime.http.common import encode

WRITE_TIMEOUT_S = 30.0  # a client that reads nothing for so long is gone
_DONE = b"data: [DONE]\n\n"


async def stream_events(
    request: web.Request, batches: AsyncGenerator[Sequence[Any], None]
) -> web.StreamResponse:
    """One event for each value of each batch, then [DONE]. Whatever `batches` raises before its first batch is raised
    here, an ordinary error response; an error after that is the last event. `batches` is closed at the end.
    """
    response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
    response.content_type, response.charset = "text/event-stream", "utf-8"
    async with contextlib.aclosing(batches):
        batch: Sequence[Any] | None = await anext(batches)
        await response.prepare(request)
        try:
            await _write_all(response, batch, batches)
        except TimeoutError:
            if request.transport is not None:
                request.transport.abort()
    return response


async def _write_all(
    response: web.StreamResponse, batch: Sequence[Any] | None, batches: AsyncGenerator[Sequence[Any], None]
) -> None:
    try:
        while batch is not None:
            await _write(response, b"".join(b"data: %s\n\n" % encode(event) for event in batch))
            batch = await anext(batches, None)
        await _write(response, _DONE)
    except ManyloraError as error:
        await _write(response, b"data: %s\n\n" % encode(ErrorBody.of(error.info())) + _DONE)


async def _write(response: web.StreamResponse, data: bytes) -> None:
    if data:
        async with asyncio.timeout(WRITE_TIMEOUT_S):
            await response.write(data)
