"""The routes about the server itself."""

from __future__ import annotations

from aiohttp import web

from manylora.runtime.http.answer_types import ModelInfo
from manylora.runtime.http.common import STATE, json_response
from manylora.runtime.http.route import Access, Route
from manylora.runtime.server_info import ServerDescription, describe_server

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
        ModelInfo(model_path=model.model_path, tokenizer_path=model.tokenizer_path or model.model_path)
    )


async def get_server_info(request: web.Request) -> web.Response:
    """Every setting, the sizes as they came out, and the scheduler's ledger."""
    state = request.app[STATE]
    ledger = await state.manager.state()
    return json_response(describe_server(state.config, state.manager.info, ledger))


async def flush_cache(request: web.Request) -> web.Response:
    """Refused while a request runs or waits."""
    await request.app[STATE].manager.flush_cache()
    return web.Response(text=_FLUSHED)


ROUTES = (
    Route("GET", "/health", health, Access.PUBLIC, "Whether the server serves."),
    Route("GET", "/get_model_info", get_model_info, Access.USER, "The model's paths.", answer=ModelInfo),
    Route(
        "GET",
        "/get_server_info",
        get_server_info,
        Access.ADMIN,
        "Settings, sizes and the scheduler's ledger.",
        answer=ServerDescription,
    ),
    *(
        Route(
            method,
            "/flush_cache",
            flush_cache,
            Access.ADMIN,
            "Forget every cached prefix.",
            text="text/plain",
            errors=(400,),
        )
        for method in ("GET", "POST")
    ),
)
