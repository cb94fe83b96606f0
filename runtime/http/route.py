"""What the server says of one route: who may call it, what it takes and what it answers."""

from __future__ import annotations

import re
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
    """One method of one path, which is aiohttp's: `{name:pattern}` says what a part may be.

    body: the type of its JSON body, None if it takes none; answer: that of its JSON answer, None where it is something else.
    streams: with `stream: true` the answer comes as server-sent events. summary: one line for the published document.
    page: for people; left out of that document.
    """

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    body: Any = None
    answer: Any = None
    streams: bool = False
    page: bool = False

    @property
    def published_path(self) -> str:
        """As documents write it: `{name}`."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)
