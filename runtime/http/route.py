"""What the server says of one route: who may call it, what it takes and what it answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from typing import Any

from aiohttp.typedefs import Handler

from manylora.runtime.http.answer_types import ErrorBody


class Access(Enum):
    """Whose key a route asks for, where the server was given keys."""

    PUBLIC = "public"  # nobody's
    USER = "user"  # any
    ADMIN = "admin"  # the admin's, if there is an admin key


@dataclass(frozen=True, slots=True)
class Route:
    """One method of one path, which is aiohttp's: `{name:pattern}` says what a part may be.

    body: the type of its JSON body, None if it takes none; query: that of its query parameters, all of them optional.
    answer: the type of its JSON answer; None: it answers a text of the content type `text`, or nothing if that is None too.
    event: the type of the server-sent events that answer `stream: true`, None if it does not stream.
    creates: 201 says that there was none before. errors: the statuses it refuses with, but for those that every route has
    or that follow from `access` and `body`; refusal: the type they are told in.
    summary: one line for the published document. page: for people; left out of that document.
    """

    method: str
    path: str
    handler: Handler
    access: Access
    summary: str
    body: Any = None
    query: Any = None
    answer: Any = None
    text: str | None = None
    event: Any = None
    creates: bool = False
    errors: tuple[int, ...] = ()
    refusal: Any = ErrorBody
    page: bool = False

    @property
    def published_path(self) -> str:
        """As documents write it: `{name}`."""
        return re.sub(r"\{(\w+):[^}]*\}", r"{\1}", self.path)
