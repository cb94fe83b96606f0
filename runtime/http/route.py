"""What the server says of one route: who may call it, what it takes and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from aiohttp.typedefs import Handler


class Access(Enum):
    """Whose key a route asks for, where the server was given keys."""

    PUBLIC = "public"  # nobody's
    USER = "user"  # any
    ADMIN = "admin"  # the admin's, if there is an admin key


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path.

    body: the type of its JSON body, None if it takes none; answer: that of its JSON answer, None where it is something else.
    streams: with `stream: true` the answer comes as server-sent events. summary: one line for the published document.
    """

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    body: Any = None
    answer: Any = None
    streams: bool = False

    @property
    def pattern(self) -> str:
        """The path as aiohttp matches it: a name may hold slashes, or whatever else is to be refused as a name."""
        return self.path.replace("{name}", "{name:(?s:.+)}")
