"""The admin API of adapters: list, load or replace, change, unload."""

from __future__ import annotations

from urllib.parse import unquote_to_bytes

import msgspec
from aiohttp import web

from manylora.runtime.adapter_types import (
    AdapterCard,
    AdapterList,
    DeleteAdapterBody,
    PatchAdapterBody,
    PutAdapterBody,
)
from manylora.runtime.api_types import convert_body
from manylora.runtime.errors import (
    AdapterBusyError,
    AdapterChangedError,
    AdapterExistsError,
    AdapterLimitError,
    AdapterNotFoundError,
    AdapterRejectedError,
    BadRequestError,
    ErrorInfo,
)
from manylora.runtime.http.common import STATE, error_response, json_response, read_body
from manylora.runtime.http.route import Access, Route
from manylora.runtime.messages import AdapterReply

_PATH = "/v1/adapters"
_NAMED = _PATH + r"/{name:[\s\S]+}"  # with slashes, and with what is to be refused as a name
# Where a name in the path makes another status right than a name in the body of the seeds' routes.
STATUSES = {
    AdapterNotFoundError.code: 404,
    AdapterExistsError.code: 409,
    AdapterBusyError.code: 409,
    AdapterLimitError.code: 409,
    AdapterRejectedError.code: 422,
    AdapterChangedError.code: 422,
}
_FIELDS = {"lora_name": "name", "lora_path": "path"}


async def list_adapters(request: web.Request) -> web.Response:
    """Every loaded adapter, in load order."""
    states = (await request.app[STATE].manager.state()).adapters
    return json_response(AdapterList([AdapterCard.of(state) for state in states]))


async def get_adapter(request: web.Request) -> web.Response:
    name = _name(request)
    for state in (await request.app[STATE].manager.state()).adapters:
        if state.lora_name == name:
            return json_response(AdapterCard.of(state))
    error = AdapterNotFoundError(f"LoRA with name {name} does not exist.", param="lora_name")
    return _error_response(error.info())


async def put_adapter(request: web.Request) -> web.Response:
    """Load, or replace what is loaded; each time under a new version. 201 if the name was free. Goes on if the client
    leaves.
    """
    name, body = _name(request), await read_body(request, PutAdapterBody)
    reply = await request.app[STATE].manager.load_adapter(
        name, body.path, pinned=body.pinned, replace=True, if_version=body.if_version, ttl_s=body.ttl_s
    )
    return _response(reply, 200 if reply.replaced else 201)


async def patch_adapter(request: web.Request) -> web.Response:
    """Change settings of what is loaded; nothing is read again, the version stays."""
    name, body = _name(request), await read_body(request, PatchAdapterBody)
    body.check()
    reply = await request.app[STATE].manager.update_adapter(
        name, pinned=body.pin, ttl_s=body.ttl_s, if_version=body.if_version
    )
    return _response(reply)


async def delete_adapter(request: web.Request) -> web.Response:
    """The name is gone at once; answers with the last state when nothing uses the adapter and everything is freed. A
    second call with a shorter time hastens the first. Goes on if the client leaves.
    """
    name, body = _name(request), await _delete_body(request)
    reply = await request.app[STATE].manager.unload_adapter(
        name, drain_s=body.patience, if_version=body.if_version
    )
    return _response(reply)


async def _delete_body(request: web.Request) -> DeleteAdapterBody:
    """From the body, or from the query: not every client and proxy lets a DELETE have a body."""
    if not request.query:
        return await read_body(request, DeleteAdapterBody) if request.can_read_body else DeleteAdapterBody()
    if request.can_read_body:
        raise BadRequestError("give a body or query parameters, not both.")
    if twice := [name for name in request.query if len(request.query.getall(name)) > 1]:
        raise BadRequestError(f"{twice[0]} is given more than once.", param=twice[0])
    return convert_body(dict(request.query), DeleteAdapterBody, strict=False)


def _name(request: web.Request) -> str:
    """The rest of the path, percent-decoded once: a slash in a name may be written as it is."""
    raw = request.rel_url.raw_path.removeprefix(_PATH + "/")
    try:
        return unquote_to_bytes(raw).decode()
    except UnicodeDecodeError as error:
        raise BadRequestError("the adapter's name in the path is not UTF-8.", param="name") from error


def _response(reply: AdapterReply, status: int = 200) -> web.Response:
    if reply.error is not None:
        return _error_response(reply.error)
    assert reply.adapter is not None
    return json_response(AdapterCard.of(reply.adapter), status)


def _error_response(error: ErrorInfo) -> web.Response:
    """With the status and the field names of these routes."""
    status = STATUSES.get(error.code, error.status)
    param = _FIELDS.get(error.param or "", error.param)
    return error_response(msgspec.structs.replace(error, status=status, param=param))


ROUTES = (
    Route("GET", _PATH, list_adapters, Access.ADMIN, "Every loaded adapter.", answer=AdapterList),
    Route("GET", _NAMED, get_adapter, Access.ADMIN, "One adapter.", answer=AdapterCard, errors=(400, 404)),
    Route(
        "PUT",
        _NAMED,
        put_adapter,
        Access.ADMIN,
        "Load or replace an adapter.",
        body=PutAdapterBody,
        answer=AdapterCard,
        creates=True,
        errors=(403, 409, 422),
    ),
    Route(
        "PATCH",
        _NAMED,
        patch_adapter,
        Access.ADMIN,
        "Change an adapter's settings.",
        body=PatchAdapterBody,
        answer=AdapterCard,
        errors=(404, 409),
    ),
    Route(
        "DELETE",
        _NAMED,
        delete_adapter,
        Access.ADMIN,
        "Unload an adapter.",
        body=DeleteAdapterBody,
        query=DeleteAdapterBody,
        answer=AdapterCard,
        errors=(404, 409),
    ),
)
