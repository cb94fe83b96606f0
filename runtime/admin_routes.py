"""The routes about adapters, models and the server itself."""

from __future__ import annotations

from typing import Any

from aiohttp import web

from manylora.runtime.api_types import AdapterResult, LoadAdapterBody, UnloadAdapterBody
from manylora.runtime.errors import BadRequestError
from manylora.runtime.http_common import STATE, HttpState, json_response, read_body
from manylora.runtime.messages import AdapterReply
from manylora.runtime.server_info import describe_server

_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


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


async def list_models(request: web.Request) -> web.Response:
    """The base model's card, then one per loaded adapter in load order."""
    state = request.app[STATE]
    adapters = (await state.manager.state()).adapters
    cards = [_card(state, state.model_name, state.config.model.model_path, None)]
    cards += [_card(state, one.lora_name, one.lora_path, state.model_name) for one in adapters]
    return json_response({"object": "list", "data": cards})


async def health(_request: web.Request) -> web.Response:
    """200 with an empty body while the server serves; before and after it is an error by the middleware."""
    return web.Response()


async def get_model_info(request: web.Request) -> web.Response:
    model = request.app[STATE].config.model
    return json_response(
        {
            "model_path": model.model_path,
            "tokenizer_path": model.tokenizer_path or model.model_path,
            "is_generation": True,
            "preferred_sampling_params": None,
            "weight_version": "default",
        }
    )


async def get_server_info(request: web.Request) -> web.Response:
    """Every setting, the sizes as they came out, and the scheduler's ledger."""
    state = request.app[STATE]
    ledger = await state.manager.state()
    return json_response(describe_server(state.config, state.manager.info, ledger))


async def flush_cache(request: web.Request) -> web.Response:
    await request.app[STATE].manager.flush_cache()
    return web.Response(text=_FLUSHED)


def _card(state: HttpState, name: str, root: str, parent: str | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.started_at,
        "owned_by": "manylora",
        "root": root,
        "parent": parent,
        "max_model_len": state.manager.info.context_length,
    }


def _not_understood(error: BadRequestError) -> web.Response:
    return json_response(AdapterResult(False, error.message, None), error.status)


def _adapter_response(reply: AdapterReply) -> web.Response:
    if reply.error is None:
        return json_response(AdapterResult(True, "", reply.loaded))
    return json_response(AdapterResult(False, reply.error.message, reply.loaded), reply.error.status)
