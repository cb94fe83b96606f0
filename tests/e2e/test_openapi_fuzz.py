"""A real server against its own published document: whatever is sent, nothing is answered that the document does not tell,
what violates the document is refused, and nothing is a 5xx.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance

from manylora.runtime.http.common import encode
from manylora.runtime.http.openapi import make_document
from manylora.runtime.http.server import ROUTES
from manylora.runtime.keys import Keys
from tests.server import Server, running_server
from tests.tiny_models import TinyModels

CASES, SLOW_CASES = 100, 1000  # of valid and of invalid data each, for every method of every path
API_KEY, ADMIN_KEY = "a" * 32, "b" * 32
DOCUMENT: dict[str, Any] = msgspec.json.decode(
    encode(make_document(ROUTES, Keys(api=(b"one",), admin=(b"another",))))
)
OPERATIONS: dict[str, Any] = {
    found.ok().label: found.ok() for found in schemathesis.openapi.from_dict(DOCUMENT).get_all_operations()
}
MODEL, ADAPTER = "base", "loaded"
BOTH = (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)
# Of these nothing can be wrong: no body, no parameter, no key.
WITHOUT_INPUT = ("GET /health", "GET /openapi.json")
KINDS = [
    pytest.param(label, mode, id=f"{label} {mode.value}")
    for label in OPERATIONS
    for mode in BOTH
    if not (label in WITHOUT_INPUT and mode is GenerationMode.NEGATIVE)
]


@pytest.fixture(scope="module")
def server(tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """With keys, a short context so that no answer is long, one adapter, and nothing else that could be loaded."""
    directory = tmp_path_factory.mktemp("fuzz")
    keys = []
    for name, key in (("api", API_KEY), ("admin", ADMIN_KEY)):
        path = directory / f"{name}.keys"
        path.write_text(key)
        path.chmod(0o600)
        keys += [f"--{name}-key-file", path]
    root = directory / "adapters"
    root.mkdir()
    with running_server(
        tiny_models.model("llama"),
        *keys,
        *("--served-model-name", MODEL, "--context-length", "32", "--adapter-root", root),
        *("--lora-paths", f"{ADAPTER}={tiny_models.adapter('llama', 'r4_qv')}"),
        log_dir=directory,
        key=ADMIN_KEY,
    ) as server:
        yield server


def test_the_server_publishes_the_document_that_is_tested(server: Server) -> None:
    assert server.get("/openapi.json").body == DOCUMENT


@pytest.mark.parametrize(("label", "mode"), KINDS)
def test_only_what_the_document_tells(server: Server, label: str, mode: GenerationMode) -> None:
    fuzz(server, label, mode, CASES)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("label", "mode"), KINDS)
def test_only_what_the_document_tells_at_length(server: Server, label: str, mode: GenerationMode) -> None:
    fuzz(server, label, mode, SLOW_CASES)


def fuzz(server: Server, label: str, mode: GenerationMode, cases: int) -> None:
    """Send so many cases. The same each time; those of a mode differ from operation to operation."""
    statuses: dict[int, int] = {}
    with requests.Session() as session:

        @settings(
            max_examples=cases,
            deadline=None,
            database=None,
            derandomize=True,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
        )
        @given(OPERATIONS[label].as_strategy(generation_mode=mode))
        def send(case: Any) -> None:
            if mode is GenerationMode.POSITIVE:
                make_useful(case)
            response = case.call_and_validate(
                base_url=server.url,
                session=session,
                headers={"Authorization": f"Bearer {ADMIN_KEY}"},
                excluded_checks=[positive_data_acceptance],  # what a schema cannot say is refused too
                timeout=60,
            )
            statuses[response.status_code] = statuses.get(response.status_code, 0) + 1

        send()
    print(label, mode.value, statuses)
    if mode is GenerationMode.POSITIVE and label not in ALWAYS_REFUSED:
        assert any(status < 300 for status in statuses), statuses


ALWAYS_REFUSED = ()


def make_useful(case: Any) -> None:
    """What a schema cannot say, so that some of the cases get past the first check: names, and how much fits."""
    body = case.body
    if not isinstance(body, dict):
        return
    if "/generate" in case.operation.path:
        body["lora_path"] = None
        body.pop("input_ids" if body.get("text") else "text", None)
    if "model" in body and len(body["model"]) % 2:
        body["model"] = MODEL if len(body) % 2 else ADAPTER
    for part in (body, body.get("sampling_params")):
        for name in ("max_tokens", "max_completion_tokens", "max_new_tokens", "min_tokens", "min_new_tokens"):
            if isinstance(part, dict) and isinstance(part.get(name), int):
                part[name] %= 8
