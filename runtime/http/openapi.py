"""`/openapi.json`: the routes as an OpenAPI 3.1 document, made of what each `Route` and its types say."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any

import msgspec
from aiohttp import web

from manylora import __version__
from manylora.runtime.http.access import keys_asked
from manylora.runtime.http.answer_types import ErrorBody
from manylora.runtime.http.common import encode
from manylora.runtime.http.route import Access, Route
from manylora.runtime.keys import Keys

_JSON = "application/json"
_REF = "#/components/schemas/{name}"
_WITH_BODY = (400, 408, 413)
_ALWAYS = (400, 417, 500, 503)  # the first two are about the head of a request, whatever its route
_DESCRIPTION = (
    "One language model and any number of LoRA adapters over it. Every refusal has a `code` that stays as it is; what is not "
    "HTTP, or no route, is refused in the shape of `ErrorBody` too."
)
_SCHEMES = {
    Access.USER: ("apiKey", "A key of `--api-key-file`."),
    Access.ADMIN: ("adminKey", "A key of `--admin-key-file`; it opens everything."),
}
_HEADERS = {
    401: ("WWW-Authenticate", "`Bearer`", {"type": "string"}),
    503: ("Retry-After", "Seconds.", {"type": "integer", "minimum": 0}),
}
DOCUMENT = web.AppKey("document", bytes)


async def openapi(request: web.Request) -> web.Response:
    """This document. It tells of the keys that this server asks for."""
    return web.Response(body=request.app[DOCUMENT], content_type=_JSON)


def install(app: web.Application, routes: Sequence[Route], keys: Keys) -> None:
    """Give the application its document, made now and once."""
    app[DOCUMENT] = encode(make_document(routes, keys))


def make_document(routes: Sequence[Route], keys: Keys) -> dict[str, Any]:
    """The document of a server that was given `keys`. The same routes always make the same bytes."""
    routes = [route for route in routes if not route.page]
    kinds = list(dict.fromkeys(kind for route in routes for kind in _kinds(route)))
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    for component in components.values():
        if "description" in component:
            component["description"] = inspect.cleandoc(component["description"])
    schema_of = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, Any] = {}
    for route in routes:
        item = paths.setdefault(route.published_path, {})
        item[route.method.lower()] = _Operation(route, keys, schema_of, components).describe()
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "manylora",
            "version": __version__,
            "summary": "Serve one base language model and any number of LoRA adapters from one batch.",
            "description": _DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                name: {"type": "http", "scheme": "bearer", "description": text}
                for name, text in _SCHEMES.values()
            },
        },
    }


def _kinds(route: Route) -> Iterator[Any]:
    """Every type that the route names."""
    kinds = (route.body, route.query, route.answer, route.event, route.refusal, ErrorBody)
    return (kind for kind in kinds if kind is not None)


class _Operation:
    """One method of one path."""

    def __init__(
        self, route: Route, keys: Keys, schema_of: dict[Any, Any], components: dict[str, Any]
    ) -> None:
        self._route = route
        self._keys = keys
        self._schema_of = schema_of
        self._components = components

    def describe(self) -> dict[str, Any]:
        route = self._route
        asked = keys_asked(route.access, self._keys)
        operation: dict[str, Any] = {
            "operationId": _operation_id(route),
            "summary": route.summary,
            "description": inspect.getdoc(route.handler) or route.summary,
            "parameters": [*self._path_parameters(), *self._query_parameters()],
            "security": [{_SCHEMES[whose][0]: []} for whose in asked],
        }
        if route.body is not None:
            operation["requestBody"] = {
                "required": route.query is None,
                "content": {_JSON: {"schema": self._schema_of[route.body]}},
            }
        operation["responses"] = self._answers() | self._refusals(asked)
        return operation

    def _path_parameters(self) -> Iterator[dict[str, Any]]:
        for name in re.findall(r"\{(\w+)\}", self._route.published_path):
            yield {
                "name": name,
                "in": "path",
                "required": True,
                "description": "Percent-encoded; a slash may stay as it is.",
                "schema": {"type": "string", "minLength": 1},
            }

    def _query_parameters(self) -> Iterator[dict[str, Any]]:
        """One for each field. Null is said by leaving it out."""
        if self._route.query is None:
            return
        name = self._schema_of[self._route.query]["$ref"].rpartition("/")[2]
        for field, schema in self._components[name]["properties"].items():
            values = [one for one in schema.get("anyOf", [schema]) if one != {"type": "null"}]
            assert len(values) == 1, field
            schema = {key: value for key, value in values[0].items() if key != "default"}
            yield {
                "name": field,
                "in": "query",
                "description": "In place of a body.",
                "schema": schema,
            }

    def _answers(self) -> dict[str, Any]:
        route = self._route
        answer: dict[str, Any] = {"description": "Done."}
        if route.answer is not None:
            answer["content"] = {_JSON: {"schema": self._schema_of[route.answer]}}
        elif route.text is not None:
            answer["content"] = {route.text: {"schema": {"type": "string"}}}
        if route.event is not None:
            event = self._schema_of[route.event]["$ref"].rpartition("/")[2]
            answer["description"] = (
                f"Done. With `stream: true` server-sent events: the data of each is a `{event}`, of the last an `ErrorBody` if "
                "it failed on the way, and then `[DONE]`."
            )
            answer["content"]["text/event-stream"] = {"schema": self._event()}
        answers = {"200": answer}
        if route.creates:
            answers["201"] = answer | {"description": "Done; there was none of that name."}
        return answers

    def _event(self) -> dict[str, Any]:
        """One event, as tools read the schema of a stream."""
        events = [self._schema_of[self._route.event], self._schema_of[ErrorBody]]
        told = {"contentMediaType": _JSON, "contentSchema": {"anyOf": events}}
        data = {"type": "string", "anyOf": [{"const": "[DONE]"}, told]}
        return {"type": "object", "properties": {"data": data}, "required": ["data"]}

    def _refusals(self, asked: Sequence[Access]) -> dict[str, Any]:
        route = self._route
        told = {*route.errors, *(_WITH_BODY if route.body is not None else ())}
        ours = {*_ALWAYS, *self._refusals_of_keys(asked)}
        return {str(status): self._refusal(status, status in told) for status in sorted(told | ours)}

    def _refusals_of_keys(self, asked: Sequence[Access]) -> set[int]:
        """401: no key or one that is not known; 403: an API key for an admin's route, or, where everything is open, a
        page of another site.
        """
        if self._route.access is Access.PUBLIC:
            return set()
        if not asked:
            return {403}
        return {401} if Access.USER in asked or not self._keys.api else {401, 403}

    def _refusal(self, status: int, told_by_route: bool) -> dict[str, Any]:
        schema = self._schema_of[ErrorBody]
        if told_by_route and self._route.refusal is not ErrorBody:
            schema = {"anyOf": [self._schema_of[self._route.refusal], schema]}
        response: dict[str, Any] = {
            "description": f"{_phrase(status)}.",
            "content": {_JSON: {"schema": schema}},
        }
        if status in _HEADERS:
            name, text, kind = _HEADERS[status]
            response["headers"] = {name: {"description": text, "required": True, "schema": kind}}
        return response


def _phrase(status: int) -> str:
    """499 is nobody's but nginx's."""
    return "Client Closed Request" if status == 499 else HTTPStatus(status).phrase


def _operation_id(route: Route) -> str:
    words = re.findall(r"\w+", f"{route.method} {route.published_path}")
    return "_".join(words).lower()


ROUTES = (Route("GET", "/openapi.json", openapi, Access.PUBLIC, "This document.", answer=dict[str, Any]),)
