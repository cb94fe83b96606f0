"""docs/errors.md has every error that a client can meet, as runtime/errors.py says it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

from manylora.runtime.errors import ConfigError, ManyloraError, RemoteError
from manylora.runtime.http.adapter_admin_routes import STATUSES

DOCUMENT = Path(__file__).resolve().parent.parent / "docs/errors.md"


def errors_of_clients() -> list[type[ManyloraError]]:
    """All but those that end a start."""

    def below(base: type[ManyloraError]) -> Iterator[type[ManyloraError]]:
        for kind in base.__subclasses__():
            yield kind
            yield from below(kind)

    found = [kind for kind in below(ManyloraError) if not issubclass(kind, (ConfigError, RemoteError))]
    return sorted((ManyloraError, *found), key=lambda kind: (kind.status, kind.code))


def row(kind: type[ManyloraError]) -> str:
    on_admin_routes = STATUSES.get(kind.code, kind.status)
    status = f"{kind.status}" if on_admin_routes == kind.status else f"{kind.status}, {on_admin_routes}"
    meaning = "A fault of ours." if kind is ManyloraError else " ".join((inspect.getdoc(kind) or "").split())
    return f"| `{kind.code}` | {status} | {meaning} |"


def test_it_lists_every_error_with_status_and_meaning() -> None:
    table = [line for line in DOCUMENT.read_text().splitlines() if line.startswith("| `")]
    assert table == [row(kind) for kind in errors_of_clients()]


def test_a_code_means_one_thing() -> None:
    codes = [kind.code for kind in errors_of_clients()]
    assert len(codes) == len(set(codes))
