"""`/generate`, `/health_generate` and `/abort_request`: the routes that make or stop text."""

from __future__ import annotations

import asyncio

from aiohttp import web

from manylora.runtime.api_types import AbortBody, GenerateBody
from manylora.runtime.errors import NotReadyError
from manylora.runtime.http.common import STATE, json_response, read_body
from manylora.runtime.http.event_stream import stream_events
from manylora.runtime.http.route import Access, Route
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.answer import Answer
from manylora.tokenizer_manager.tokenizer_manager import TokenizerManager

HEALTH_TIMEOUT_S = 20.0


async def generate(request: web.Request) -> web.StreamResponse:
    """One answer for one input, a list for a list or n > 1. With `stream`, server-sent events, each with all of one
    answer's text so far.
    """
    body = await read_body(request, GenerateBody)
    call = body.to_call()
    if body.stream:
        return await stream_events(request, request.app[STATE].manager.stream(call))
    answers = await request.app[STATE].manager.generate(call)
    return json_response(answers if call.answers_list else answers[0])


async def health_generate(request: web.Request) -> web.Response:
    """200 if one token of the base model comes back in time, through every process. Where it has to wait its turn that
    long, steps that went on meanwhile are proof enough: a busy server is not a sick one.
    """
    manager = request.app[STATE].manager
    token = manager.info.model.bos_token_id or 0
    params = SamplingParams(max_new_tokens=1, temperature=0.0)
    call = GenerateBody(input_ids=[token], sampling_params=params).to_call()
    try:
        steps = await _num_steps(manager)
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await manager.generate(call)
        except TimeoutError:
            if await _num_steps(manager) == steps:
                raise
    except TimeoutError as error:
        raise NotReadyError(f"No token came back within {HEALTH_TIMEOUT_S:.0f} s.") from error
    return web.Response()


async def _num_steps(manager: TokenizerManager) -> int:
    """Steps that the workers have completed. Raises TimeoutError if the scheduler does not answer."""
    async with asyncio.timeout(HEALTH_TIMEOUT_S):
        return (await manager.state()).steps


async def abort_request(request: web.Request) -> web.Response:
    """End requests by id prefix, or all; they answer with what they have."""
    body = await read_body(request, AbortBody)
    body.check()
    request.app[STATE].manager.abort(body.rid, abort_all=body.abort_all)
    return web.Response()


ROUTES = (
    *(
        Route(
            method,
            "/generate",
            generate,
            Access.USER,
            "Generate text.",
            body=GenerateBody,
            answer=Answer | list[Answer],
            event=Answer,
            errors=(410,),
        )
        for method in ("POST", "PUT")
    ),
    Route("POST", "/abort_request", abort_request, Access.USER, "End requests.", body=AbortBody),
    Route("GET", "/health_generate", health_generate, Access.USER, "Whether a token comes back in time."),
)
