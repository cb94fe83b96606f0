"""The seeds' routes about adapters."""

from __future__ import annotations

from aiohttp import web

from manylora.runtime.api_types import AdapterResult, LoadAdapterBody, UnloadAdapterBody
from manylora.runtime.errors import BadRequestError
from manylora.runtime.http.common import STATE, json_response, read_body
from manylora.runtime.http.route import Access, Route
from manylora.runtime.messages import AdapterReply


async def load_lora_adapter(request: web.Request) -> web.Response:
    """Load an adapter from a directory or hub id. Goes on if the client leaves."""
    try:
        body = await read_body(request, LoadAdapterBody)
    except BadRequestError as error:
        return _not_understood(error)
    reply = await request.app[STATE].manager.load_adapter(
        body.lora_name, body.lora_path, pinned=body.pinned, replace=body.replace
    )
    return _adapter_response(reply)


async def unload_lora_adapter(request: web.Request) -> web.Response:
    """The name is gone at once; answers when its last request has ended and everything is freed."""
    try:
        body = await read_body(request, UnloadAdapterBody)
    except BadRequestError as error:
        return _not_understood(error)
    return _adapter_response(await request.app[STATE].manager.unload_adapter(body.lora_name))


def _not_understood(error: BadRequestError) -> web.Response:
    return json_response(AdapterResult(False, error.message, None, error.code), error.status)


def _adapter_response(reply: AdapterReply) -> web.Response:
    if reply.error is None:
        return json_response(AdapterResult(True, "", reply.loaded))
    error = reply.error
    return json_response(AdapterResult(False, error.message, reply.loaded, error.code), error.status)


ROUTES = (
    Route(
        "POST",
        "/load_lora_adapter",
        load_lora_adapter,
        Access.ADMIN,
        "Load an adapter.",
        body=LoadAdapterBody,
        answer=AdapterResult,
        errors=(403,),
        refusal=AdapterResult,
    ),
    Route(
        "POST",
        "/unload_lora_adapter",
        unload_lora_adapter,
        Access.ADMIN,
        "Unload an adapter.",
        body=UnloadAdapterBody,
        answer=AdapterResult,
        refusal=AdapterResult,
    ),
)
