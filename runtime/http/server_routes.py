"""The routes about the server itself."""

from __future__ import annotations

from aiohttp import web

from manylora.runtime.http.common import STATE, json_response
from manylora.runtime.http.route import Access, Route
from manylora.runtime.server_info import describe_server

_FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


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


ROUTES = (
    Route("GET", "/health", health, Access.PUBLIC, "Whether the server serves."),
    Route("GET", "/get_model_info", get_model_info, Access.USER, "The model's paths."),
    Route(
        "GET",
        "/get_server_info",
        get_server_info,
        Access.ADMIN,
        "Settings, sizes and the scheduler's ledger.",
    ),
    Route("GET", "/flush_cache", flush_cache, Access.ADMIN, "Forget every cached prefix."),
    Route("POST", "/flush_cache", flush_cache, Access.ADMIN, "Forget every cached prefix."),
)
