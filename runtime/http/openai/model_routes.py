"""`/v1/models`: what `model` may name."""

from __future__ import annotations

from aiohttp import web

from manylora.runtime.http.common import STATE, HttpState, json_response
from manylora.runtime.http.openai.answer_types import ModelCard, ModelList
from manylora.runtime.http.openai.call import unknown_model
from manylora.runtime.http.route import Access, Route


async def list_models(request: web.Request) -> web.Response:
    """The base model's card, then one per loaded adapter in load order."""
    return json_response(ModelList("list", await _cards(request.app[STATE])))


async def get_model(request: web.Request) -> web.Response:
    """The card of one of them."""
    wanted = request.match_info["model"]
    for card in await _cards(request.app[STATE]):
        if card.id == wanted:
            return json_response(card)
    raise unknown_model(wanted)


async def _cards(state: HttpState) -> list[ModelCard]:
    adapters = (await state.manager.state()).adapters
    return [
        _card(state, state.model_name, state.config.model.model_path, None),
        *(_card(state, one.lora_name, one.lora_path, state.model_name) for one in adapters),
    ]


def _card(state: HttpState, name: str, root: str, parent: str | None) -> ModelCard:
    length = state.manager.info.context_length
    return ModelCard(name, "model", state.started_at, "manylora", root, parent, length)


ROUTES = (
    Route(
        "GET",
        "/v1/models",
        list_models,
        Access.USER,
        "The base model and every loaded adapter.",
        answer=ModelList,
    ),
    # A name may have slashes, as a hub id has.
    Route(
        "GET",
        "/v1/models/{model:.+}",
        get_model,
        Access.USER,
        "One of them.",
        answer=ModelCard,
        errors=(404,),
    ),
)
