"""What every HTTP route shares: the state of the front, reading a body, and answering with JSON or an error."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from aiohttp import web
from aiohttp.typedefs import Handler

from manylora.runtime.api_types import decode_body
from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import (
    BadRequestError,
    BodyTimeoutError,
    BodyTooLargeError,
    ErrorInfo,
    ExpectationFailedError,
    ManyloraError,
    MethodNotAllowedError,
    NotReadyError,
    RouteNotFoundError,
)
from manylora.runtime.http.answer_types import ErrorBody
from manylora.runtime.keys import Keys
from manylora.tokenizer_manager.chat_template import ChatTemplate
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager

logger = logging.getLogger("manylora.http")

MAX_BODY_BYTES = 32 * 1024 * 1024
BODY_TIMEOUT_S = 30.0

T = TypeVar("T")
_ERRORS_OF_AIOHTTP = {
    kind.status: kind
    for kind in (RouteNotFoundError, MethodNotAllowedError, BodyTooLargeError, ExpectationFailedError)
}
_encoder = msgspec.json.Encoder()


@dataclass
class HttpState:
    """What the routes act on. `ready` turns true once, after the warm-up. `chat`: the model's template, once it is known."""

    config: ServerConfig
    manager: TokenizerManager
    keys: Keys = field(default_factory=Keys)
    ready: bool = False
    chat: ChatTemplate = field(default_factory=ChatTemplate)
    started_at: int = field(default_factory=lambda: int(time.time()))

    @property
    def model_name(self) -> str:
        """The base model's name in /v1/models."""
        return self.config.model.served_model_name or self.config.model.model_path


STATE = web.AppKey("state", HttpState)


async def read_body(request: web.Request, kind: type[T]) -> T:
    """The request's JSON body as `kind`. Raises BadRequestError, BodyTimeoutError, or for one that is too large
    BodyTooLargeError if it says so before, HTTPRequestEntityTooLarge if it does not."""
    if "Content-Encoding" in request.headers:
        raise BadRequestError("a compressed body is not supported.", param="Content-Encoding")
    if (request.content_length or 0) > MAX_BODY_BYTES:
        raise BodyTooLargeError(f"A body has at most {MAX_BODY_BYTES} bytes.")
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            body = await request.read()
    except TimeoutError as error:
        raise BodyTimeoutError(f"The body did not arrive within {BODY_TIMEOUT_S:.0f} s.") from error
    return decode_body(body, kind)


def encode(value: Any) -> bytes:
    """msgspec types and plain values to JSON."""
    return _encoder.encode(value)


def json_response(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=encode(value), status=status, content_type="application/json")


@web.middleware
async def answer_errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Whatever a route raises becomes an error body; what nobody foresaw is logged and says nothing of the inside."""
    try:
        return await handler(request)
    except ManyloraError as error:
        return error_response(error.info())
    except web.HTTPException as error:
        kind = _ERRORS_OF_AIOHTTP.get(error.status, BadRequestError)
        headers = {"Allow": error.headers["Allow"]} if "Allow" in error.headers else None
        message = f"{request.method} {request.path}: {error.text or error.reason}"
        info = msgspec.structs.replace(kind(message).info(), status=error.status)
        return error_response(info, headers)
    except ConnectionError:
        raise  # the client left
    except Exception:
        logger.exception("%s %s failed", request.method, request.path)
        return error_response(ErrorInfo(ManyloraError.code, "Internal error; see the server's log.", 500))


def error_response(error: ErrorInfo, headers: Mapping[str, str] | None = None) -> web.Response:
    response = json_response(ErrorBody.of(error), error.status)
    response.headers.update(headers or {})
    if error.status == 503:
        response.headers["Retry-After"] = "1"
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


@web.middleware
async def check_ready(request: web.Request, handler: Handler) -> web.StreamResponse:
    """503 before the server serves, and its failure's error after it did."""
    state = request.app[STATE]
    if state.manager.failure is not None:
        raise state.manager.failure
    if not state.ready:
        raise NotReadyError("The server is still starting.")
    return await handler(request)
