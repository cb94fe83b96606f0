"""The published document: that it is valid, complete and stable, and that its bounds are those that are checked."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import msgspec
import pytest
from openapi_spec_validator import validate

from manylora.runtime.http.access import keys_asked, refusal
from manylora.runtime.http.common import encode
from manylora.runtime.http.openapi import make_document
from manylora.runtime.http.route import Access
from manylora.runtime.http.server import ROUTES
from manylora.runtime.keys import Keys
from manylora.runtime.server_info import ServerDescription
from tests.runtime.http_front import HttpFront, served
from tests.server import REPOSITORY, environment_of_a_program
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, in_loop
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

API, ADMIN = "api key of a test", "admin key of a test"


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


KEYS = [
    Keys(api, admin) for api in ((), (digest(API),)) for admin in ((), (digest(ADMIN),))
]  # given and not given
WITHOUT_CONTENT = ["POST /abort_request", "GET /health_generate", "GET /health"]


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)
    template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (directory / "chat_template.jinja").write_text(template)
    return directory


def document_of(keys: Keys) -> dict[str, Any]:
    return msgspec.json.decode(encode(make_document(ROUTES, keys)))


@pytest.mark.parametrize("keys", KEYS)
def test_it_is_a_valid_openapi_document(keys: Keys) -> None:
    validate(document_of(keys))


def test_it_has_every_route_but_pages_and_each_says_what_it_answers() -> None:
    paths = document_of(Keys())["paths"]
    published = [f"{method.upper()} {path}" for path, item in paths.items() for method in item]
    assert sorted(published) == sorted(f"{r.method} {r.published_path}" for r in ROUTES if not r.page)
    silent = [
        f"{method.upper()} {path}"
        for path, item in paths.items()
        for method, operation in item.items()
        if "content" not in operation["responses"]["200"]
    ]
    assert silent == WITHOUT_CONTENT
    ids = [operation["operationId"] for item in paths.values() for operation in item.values()]
    assert len(ids) == len(set(ids))


def test_it_is_the_same_in_every_process() -> None:
    program = (
        "import hashlib; from manylora.runtime.http.openapi import make_document;"
        "from manylora.runtime.http.common import encode; from manylora.runtime.http.server import ROUTES;"
        "from manylora.runtime.keys import Keys; print(hashlib.sha256(encode(make_document(ROUTES, Keys()))).hexdigest())"
    )
    made = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={**environment_of_a_program(), "PYTHONHASHSEED": seed},
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(made) == 1


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("level", Access)
def test_the_keys_it_asks_for_are_those_that_open(keys: Keys, level: Access) -> None:
    opens = {
        whose: refusal(level, [f"Bearer {key}"], keys) is None
        for whose, key, given in ((Access.USER, API, keys.api), (Access.ADMIN, ADMIN, keys.admin))
        if given
    }
    asked = keys_asked(level, keys)
    assert bool(asked) == (refusal(level, [], keys) is not None)
    if asked:
        assert set(asked) == {whose for whose, does in opens.items() if does}


@pytest.mark.parametrize("keys", KEYS)
def test_refusals_of_keys_are_told(keys: Keys) -> None:
    document = document_of(keys)
    for route in (route for route in ROUTES if not route.page):
        responses = document["paths"][route.published_path][route.method.lower()]["responses"]
        for headers in ([], [f"Bearer {API}"]):
            for cross_site in (True, False):
                error = refusal(route.access, headers, keys, cross_site=cross_site)
                assert error is None or str(error.status) in responses


@in_loop
async def test_it_is_served_to_everybody(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir, keys=KEYS[-1]) as front:
        status, document = await front.get("/openapi.json")
        assert (status, document) == (200, document_of(KEYS[-1]))


@in_loop
async def test_server_info_is_what_its_type_says(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        _, info = await front.get("/get_server_info")
        assert set(info) == set(ServerDescription.__struct_fields__)
        assert set(info["internal_states"][0]) == set(
            document_of(Keys())["components"]["schemas"]["Ledger"]["properties"]
        )
        msgspec.convert(info, ServerDescription)


# ---- bounds -------------------------------------------------------------------------------------------------------

BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GenerateBody": ("/generate", {"text": "x", "sampling_params": {"max_new_tokens": 1}}),
    "SamplingParams": ("/generate", {"text": "x"}),
    "CompletionBody": ("/v1/completions", {"model": "base", "prompt": "x", "max_tokens": 1}),
    "ChatBody": (
        "/v1/chat/completions",
        {"model": "base", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "logprobs": True},
    ),
}
# With what else a field at its bounds makes sense.
COMPANY: dict[str, dict[str, Any]] = {
    "input_ids": {"text": None},
    "min_new_tokens": {"max_new_tokens": 2**31 - 1},
    "min_tokens": {"max_tokens": 2**31 - 1},
    "max_completion_tokens": {"max_tokens": None},
    "sampling_seed": {"seed": None},
}
# What no schema of one field can say: it is the model's, or another field's.
NOT_OF_THE_FIELD = (
    "the vocabulary has",
    "the prompt's length",
    "is a list, but there is one input",
    "takes at most 63 ids",
)


def edges(schema: dict[str, Any]) -> Iterator[Any]:
    """Values at each bound of a schema, and just beyond."""
    if "anyOf" in schema:
        for one in schema["anyOf"]:
            yield from edges({**one, **{key: value for key, value in schema.items() if key != "anyOf"}})
    step = 1 if schema.get("type") == "integer" else None
    for bound in (schema.get("minimum"), schema.get("exclusiveMinimum"), schema.get("maximum")):
        if bound is not None:
            yield bound
            yield from (
                (bound - 1, bound + 1)
                if step
                else (math.nextafter(bound, -math.inf), math.nextafter(bound, math.inf))
            )
    if schema.get("type") == "string":
        for bound in (schema.get("minLength"), schema.get("maxLength")):
            if bound is not None:
                yield from ("y" * length for length in (bound - 1, bound, bound + 1) if length >= 0)
    if schema.get("type") == "array":
        is_item = jsonschema.Draft202012Validator(schema["items"]).is_valid
        for bound in (schema.get("minItems"), schema.get("maxItems")):
            if bound is not None:
                item = next(one for one in ITEMS if is_item(one))
                yield from ([item] * length for length in (bound - 1, bound, bound + 1) if length >= 0)
        yield from ([edge] for edge in edges(schema["items"]))


ITEMS: tuple[Any, ...] = (5, "y", {"role": "user", "content": "x"})


def bounded_fields(kind: str) -> Iterator[tuple[str, dict[str, Any], list[Any]]]:
    """Name, schema and the values to try of every field of a type that has a bound."""
    schemas = document_of(Keys())["components"]["schemas"]
    for name, schema in schemas[kind]["properties"].items():
        whole = inline(schema, schemas)
        if values := list(edges(whole)):
            yield name, whole, values


def inline(schema: Any, schemas: dict[str, Any]) -> Any:
    """Without references."""
    if isinstance(schema, list):
        return [inline(one, schemas) for one in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return inline(schemas[schema["$ref"].rpartition("/")[2]], schemas)
    return {key: inline(value, schemas) for key, value in schema.items()}


@pytest.mark.parametrize("kind", BASES)
@in_loop
async def test_bounds_are_those_that_are_checked(tokenizer_dir: Path, kind: str) -> None:
    fields = list(bounded_fields(kind))
    assert len(fields) > 4
    async with served(tokenizer_dir) as front:
        for name, schema, values in fields:
            is_valid = jsonschema.Draft202012Validator(schema).is_valid
            assert {is_valid(value) for value in values} == {True, False}, name
            for value in values:
                error = await refusal_of(front, kind, name, value)
                if not is_valid(value):
                    assert error is not None, (name, value)
                elif error is not None:
                    told = any(word in error["message"] for word in NOT_OF_THE_FIELD)
                    assert told or error["code"] == "context_length_exceeded", (name, value, error)


async def refusal_of(front: HttpFront, kind: str, name: str, value: Any) -> dict[str, Any] | None:
    """The error that the field's value gets, if any."""
    path, base = BASES[kind]
    fields = {**COMPANY.get(name, {}), name: value}
    if kind == "SamplingParams":
        body = {**base, "sampling_params": {"max_new_tokens": 1, **fields}}
    else:
        body = {**base, **fields}
    status, answer = await front.post(path, body)
    assert status in (200, 400), answer
    return answer["error"] if status == 400 else None
