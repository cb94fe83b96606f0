"""docs/api.md is what the server does: every request in it is sent, in order, and answered as it says. Those of the
README and of docs/structured_output.md are answered, too.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

from manylora.runtime.adapter_types import DeleteAdapterBody, PatchAdapterBody, PutAdapterBody
from manylora.runtime.api_types import AbortBody, GenerateBody, LoadAdapterBody, UnloadAdapterBody
from manylora.runtime.http.openai.request_types import ChatBody, CompletionBody
from manylora.runtime.http.route import Access
from manylora.runtime.http.server import ROUTES
from manylora.runtime.sampling_params import SamplingParams
from tests.server import REPOSITORY, Server, running_server

TEXT = (REPOSITORY / "docs/api.md").read_text(encoding="utf-8")
SECTIONS: dict[str, str] = {}  # heading -> text
for part in re.split(r"^#{2,3} ", TEXT, flags=re.MULTILINE)[1:]:
    heading, _, text = part.partition("\n")
    SECTIONS[heading] = text
OPENAI = "Text: OpenAI's routes"
SAMPLING = "Sampling parameters:"
# Section -> the type of the body that its tables list, and the sections whose tables are of the same body.
BODIES: dict[str, tuple[type[msgspec.Struct], tuple[str, ...]]] = {
    "`POST /generate`, `PUT /generate`": (GenerateBody, ()),
    "`POST /abort_request`": (AbortBody, ()),
    "`POST /v1/completions`": (CompletionBody, (OPENAI,)),
    "`POST /v1/chat/completions`": (ChatBody, (OPENAI,)),
    "`PUT /v1/adapters/{name}`": (PutAdapterBody, ()),
    "`PATCH /v1/adapters/{name}`": (PatchAdapterBody, ()),
    "`DELETE /v1/adapters/{name}`": (DeleteAdapterBody, ()),
    "`POST /load_lora_adapter`": (LoadAdapterBody, ()),
    "`POST /unload_lora_adapter`": (UnloadAdapterBody, ()),
}
# What differs from run to run: only whether it is a number, a text or null is compared.
VARYING = {"id", "created", "e2e_latency", "cached_tokens", "queue_s", "loaded_at", "last_use"}


class Exchange(NamedTuple):
    """A curl command, and the answer that the next fence holds. kind: "json", "json part", "text"; "" without one."""

    method: str
    path: str
    body: bytes | None
    kind: str
    status: int
    answer: str


def exchanges() -> Iterator[Exchange]:
    fences = re.findall(r"^```(.*)\n([\s\S]*?)^```$", TEXT, flags=re.MULTILINE)
    for (language, source), (info, answer) in zip(fences, [*fences[1:], ("", "")], strict=True):
        if language != "bash" or not source.startswith("curl"):
            continue
        method, path, body = read_curl(source)
        language, _, rest = info.partition(" ")
        if language not in ("json", "text"):
            yield Exchange(method, path, body, "", 200, "")
        elif rest.isdigit():
            yield Exchange(method, path, body, language, int(rest), answer)
        else:
            yield Exchange(method, path, body, info, 200, answer)


def read_curl(command: str) -> tuple[str, str, bytes | None]:
    """Method, path and body of one curl command with the few options that the document needs."""
    name, *words = shlex.split(command)
    assert name == "curl"
    method, path, body = "", "", None
    while words:
        word = words.pop(0)
        if word == "-X":
            method = words.pop(0)
        elif word == "-d":
            body = words.pop(0).encode()
        elif word.startswith("localhost:30000/"):
            path = word.removeprefix("localhost:30000")
        else:
            assert word == "-N", word
    return method or ("POST" if body else "GET"), path, body


def assert_same(told: Any, got: Any, place: str, *, part: bool) -> None:
    """`told` by the document, `got` from the server. part: the document leaves fields out."""
    name = place.rpartition(".")[2]
    if name in VARYING:
        assert isinstance(got, (int, float)) == isinstance(told, (int, float)), place
        assert (got is None) == (told is None), place
    elif isinstance(told, dict):
        assert isinstance(got, dict), place
        assert told.keys() <= got.keys() if part else told.keys() == got.keys(), place
        for key in told:
            assert_same(told[key], got[key], f"{place}.{key}", part=part)
    elif isinstance(told, list):
        assert isinstance(got, list), place
        assert len(told) == len(got), place
        for index, (one, other) in enumerate(zip(told, got, strict=True)):
            assert_same(one, other, f"{place}[{index}]", part=part)
    elif isinstance(told, float):
        assert got == pytest.approx(told, rel=1e-3, abs=1e-5), place
    else:
        assert (told, type(told)) == (got, type(got)), place


def assert_same_events(told: str, got: str, place: str) -> None:
    """The same end and the same text; where the text is cut into events differs from run to run."""
    told_events, got_events = events_of(told), events_of(got)
    assert_same(told_events[-1], got_events[-1], place, part=False)
    assert {frozenset(event) for event in told_events} == {frozenset(event) for event in got_events}
    assert text_of(told_events) == text_of(got_events)


def events_of(stream: str) -> list[Any]:
    *events, done = [line.removeprefix("data: ") for line in stream.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def text_of(events: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content", "") for event in events for choice in event.get("choices", ())
    )


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """As the documents start it."""
    adapters = [f"{name}=demo/adapters/{name}" for name in ("json", "upper_case")]
    with running_server("demo/model", "--lora-paths", *adapters, log_dir=tmp_path) as running:
        yield running


def test_every_answer_is_the_servers(server: Server) -> None:
    num_compared = 0
    for one in exchanges():
        reply = server.request(one.method, one.path, one.body)
        place = f"{one.method} {one.path}"
        assert reply.status == one.status, (place, reply.body)
        if one.kind == "text":
            assert_same_events(one.answer, reply.body, place)
        elif one.kind:
            assert_same(json.loads(one.answer), reply.body, place, part=one.kind == "json part")
        num_compared += bool(one.kind)
    assert num_compared > 20


def test_requests_of_other_pages_are_answered(server: Server) -> None:
    pages = ("README.md", "docs/structured_output.md")
    text = "\n".join((REPOSITORY / page).read_text(encoding="utf-8") for page in pages)
    fences = re.findall(r"^```bash\n([\s\S]*?)^```$", text, flags=re.MULTILINE)
    commands = [part for fence in fences for part in re.split(r"^(?=\w)", fence, flags=re.MULTILINE)]
    requests = [read_curl(command) for command in commands if command.startswith("curl ")]
    assert len(requests) >= 7
    for method, path, body in requests:
        reply = server.request(method, path, body)
        assert reply.status in (200, 201), (method, path, reply.body)


def test_every_route_has_its_section_and_level() -> None:
    levels = {Access.PUBLIC: "Public", Access.USER: "User", Access.ADMIN: "Admin"}
    told = {
        route: text for heading, text in SECTIONS.items() for route in re.findall(r"`([A-Z]+ /.*?)`", heading)
    }
    assert sorted(told) == sorted(f"{route.method} {route.published_path}" for route in ROUTES)
    for route in ROUTES:
        if "lora_adapter" in route.path or route.path.startswith("/v1/adapters"):  # they share one sentence
            assert route.access is Access.ADMIN
            assert "\nAdmin, all of them." in SECTIONS["Adapters"]
        else:
            name = f"{route.method} {route.published_path}"
            assert told[name].lstrip().startswith(f"{levels[route.access]}."), name


@pytest.mark.parametrize("section", BODIES)
def test_fields_and_defaults_are_those_of_the_body(section: str) -> None:
    kind, others = BODIES[section]
    text = "\n".join(SECTIONS[name].split(SAMPLING)[0] for name in (*others, section))
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| ([^|]+) \|", text, flags=re.MULTILINE)
    assert {name for name, _ in rows} <= fields.keys()
    for name, default in rows:
        assert default == told_default(fields[name]), name
    assert [name for name in fields if f"`{name}`" not in text] == []


def test_every_sampling_parameter_has_its_row() -> None:
    section = SECTIONS["`POST /generate`, `PUT /generate`"].split(SAMPLING)[1]
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|", section, flags=re.MULTILINE)
    assert rows == [(field.name, told_default(field)) for field in msgspec.structs.fields(SamplingParams)]


def told_default(field: msgspec.structs.FieldInfo) -> str:
    if field.default is msgspec.NODEFAULT:
        return "required"
    if field.default is msgspec.UNSET:
        return "as it is"
    return f"`{json.dumps(field.default)}`"
