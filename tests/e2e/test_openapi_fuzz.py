"""A real server against its own published document: whatever is sent, nothing is answered that the document does not tell,
what violates the document is refused, and nothing is a 5xx.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import ignored_auth, positive_data_acceptance

from manylora.runtime.http.common import encode
from manylora.runtime.http.openapi import make_document
from manylora.runtime.http.server import ROUTES
from manylora.runtime.keys import Keys
from tests.server import Server, running_server
from tests.tiny_models import TinyModels

# Of valid and of invalid data each, for every method of every path that takes any.
CASES, SLOW_CASES = 100, 1000
API_KEY, ADMIN_KEY = "a" * 32, "b" * 32
DOCUMENT: dict[str, Any] = msgspec.json.decode(
    encode(make_document(ROUTES, Keys(api=(b"one",), admin=(b"another",))))
)
SLOWNESS = (
    HealthCheck.too_slow,
    HealthCheck.filter_too_much,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
)
SCHEMA: Any = schemathesis.openapi.from_dict(DOCUMENT)
OPERATIONS: dict[str, Any] = {found.ok().label: found.ok() for found in SCHEMA.get_all_operations()}
# What a schema cannot say is refused too; and keys are another test's.
NOT_HERE = [positive_data_acceptance, ignored_auth]
MODEL, ADAPTER = "base", "loaded"
OPERATION_OF = {
    f"{method.upper()} {path}": operation
    for path, item in DOCUMENT["paths"].items()
    for method, operation in item.items()
}
WITH_INPUT = [label for label, one in OPERATION_OF.items() if one["parameters"] or "requestBody" in one]
KINDS = [
    pytest.param(label, mode, id=f"{label} {mode.value}")
    for label in OPERATION_OF
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
    if label in WITH_INPUT or mode is GenerationMode.POSITIVE
]


@pytest.fixture(scope="module")
def adapter(tiny_models: TinyModels) -> Path:
    return tiny_models.adapter("llama", "r4_qv")


@pytest.fixture(scope="module")
def server(
    tiny_models: TinyModels, adapter: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """With keys, a short context so that no answer is long, and nothing that could be loaded but one adapter."""
    directory = tmp_path_factory.mktemp("fuzz")
    keys = []
    for name, key in (("api", API_KEY), ("admin", ADMIN_KEY)):
        path = directory / f"{name}.keys"
        path.write_text(key)
        path.chmod(0o600)
        keys += [f"--{name}-key-file", path]
    root = directory / "adapters"
    root.mkdir()
    template = directory / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")
    with running_server(
        tiny_models.model("llama"),
        *keys,
        *("--served-model-name", MODEL, "--context-length", "24", "--adapter-root", root),
        *("--chat-template", template),
        *("--lora-paths", f"named={adapter}"),
        log_dir=directory,
        key=ADMIN_KEY,
    ) as server:
        yield server


def test_the_server_publishes_the_document_that_is_tested(server: Server) -> None:
    assert server.get("/openapi.json").body == DOCUMENT


@pytest.mark.parametrize(("label", "mode"), KINDS)
def test_only_what_the_document_tells(
    server: Server, adapter: Path, label: str, mode: GenerationMode
) -> None:
    fuzz(server, adapter, label, mode, CASES)


@pytest.mark.parametrize("label", [label for label, one in OPERATION_OF.items() if one["security"]])
def test_a_key_is_asked_for_where_the_document_says_so(server: Server, label: str) -> None:
    """None, one that is not known, and, where it takes the admin's, one that is not the admin's."""
    body = {"body": {}} if "requestBody" in OPERATION_OF[label] else {}
    case = OPERATIONS[label].Case(path_parameters={"name": ADAPTER, "model": MODEL}, **body)
    wrong = (
        [None, "c" * 32, API_KEY]
        if {"apiKey": []} not in OPERATION_OF[label]["security"]
        else [None, "c" * 32]
    )
    for key in wrong:
        response = case.call_and_validate(
            base_url=server.url, headers={} if key is None else {"Authorization": f"Bearer {key}"}
        )
        assert response.status_code == (403 if key == API_KEY else 401)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("label", "mode"), KINDS)
def test_only_what_the_document_tells_at_length(
    server: Server, adapter: Path, label: str, mode: GenerationMode
) -> None:
    fuzz(server, adapter, label, mode, SLOW_CASES)


def fuzz(server: Server, adapter: Path, label: str, mode: GenerationMode, cases: int) -> None:
    """Send so many cases, the same each time."""
    statuses: set[int] = set()
    assert server.load(ADAPTER, adapter, replace=True).status == 200
    with requests.Session() as session:

        @settings(
            max_examples=cases if label in WITH_INPUT else 5,
            deadline=None,
            database=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=SLOWNESS,
        )
        @given(OPERATIONS[label].as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            if mode is GenerationMode.POSITIVE:
                make_useful(case, str(adapter))
            response = case.call_and_validate(
                base_url=server.url,
                session=session,
                headers={"Authorization": f"Bearer {ADMIN_KEY}"},
                excluded_checks=NOT_HERE,
                timeout=60,
            )
            statuses.add(response.status_code)
            if response.headers.get("Content-Type", "").startswith("text/event-stream"):
                check_events(response.text)

        send()
    if mode is GenerationMode.POSITIVE:
        assert 200 in statuses, statuses
    if mode is GenerationMode.NEGATIVE and "requestBody" in OPERATION_OF[label]:
        assert 400 in statuses, statuses


def check_events(text: str) -> None:
    """None tells a fault of the server, and the last is [DONE]. That each is what the document says was checked before."""
    data = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert data.pop() == "[DONE]"
    assert data
    assert all(json.loads(one).get("error", {}).get("type") != "server_error" for one in data)


def make_useful(case: Any, adapter_path: str) -> None:
    """What a schema cannot say, for some of the cases, so that they get past the first checks: names that there are, few
    fields that contradict each other, and answers that fit.
    """
    names = case.path_parameters or {}
    for name in names.keys() & {"name", "model"}:
        if one_of(4, names[name]):
            names[name] = ADAPTER
    if not isinstance(
        case.body, dict
    ):  # nor touched: schemathesis takes "no body" for a wrong one where it was assigned
        return
    body = case.body = whole_numbers(case.body)
    for part in (body, body.get("sampling_params")):
        if isinstance(part, dict):
            thin_out(part)
    for message in body.get("messages", ()):
        thin_out(message)
        message["content"] = message.get("content") or "x"
    if "model" in body and not one_of(4, body["model"]):
        body["model"] = ADAPTER if one_of(2, body["model"]) else MODEL
    if "adapter" in case.operation.path:
        for name in body.keys() & {"path", "lora_path"}:
            if one_of(2, body[name]):
                body[name] = adapter_path
    if body.get("lora_name") and one_of(2, body["lora_name"]):
        body["lora_name"] = ADAPTER
    if case.operation.path == "/generate" and "input_ids" not in body:
        body.setdefault("text", "x")
        body["sampling_params"] = body.get("sampling_params") or {"max_new_tokens": 2}
    if "model" in body and not one_of(8, body):
        body.setdefault("max_tokens", 2)


KEPT = {
    *("model", "prompt", "messages", "text", "stream", "sampling_params"),
    *("abort_all", "lora_name", "path", "pinned", "role", "content"),
}


def thin_out(fields: dict[str, Any]) -> None:
    """Most of what may be left out is; counts of tokens become small."""
    for name, value in list(fields.items()):
        needed = name in KEPT or (name == "lora_path" and "lora_name" in fields)
        if not needed and not one_of(8, [name, fields]):
            del fields[name]
        elif name.endswith("_tokens") and isinstance(value, int):
            fields[name] = value % 8


def whole_numbers(value: Any) -> Any:
    """5.0 as 5, which to a schema is the same."""
    if isinstance(value, dict):
        return {key: whole_numbers(one) for key, one in value.items()}
    if isinstance(value, list):
        return [whole_numbers(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def one_of(count: int, value: Any) -> bool:
    """True for one of so many values, always the same."""
    return zlib.crc32(repr(value).encode("utf-8", "surrogatepass")) % count == 0
