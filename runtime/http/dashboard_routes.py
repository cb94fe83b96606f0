"""The page at `/` and the files it is made of. They hold nothing of this server: the page asks the other routes, with the
key of whoever looks at it.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from aiohttp import ETag, web

from manylora.runtime.http.route import Access, Route

_FOLDER = Path(__file__).parent / "dashboard"
_PAGE = "index.html"
_TYPES = {
    ".html": "text/html",
    ".css": "text/css",
    ".js": "text/javascript",
    ".svg": "image/svg+xml",
}
# Nothing comes from elsewhere, nothing goes there, nobody frames the buttons, and no text becomes markup.
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Cache-Control": "no-cache",  # ask each time; the ETag says that nothing has changed
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


@dataclass(frozen=True, slots=True)
class _File:
    content: bytes
    content_type: str
    etag: ETag


def _read(path: Path) -> _File:
    content = path.read_bytes()
    return _File(content, _TYPES[path.suffix], ETag(hashlib.sha256(content).hexdigest()[:32]))


_FILES = {path.name: _read(path) for path in sorted(_FOLDER.iterdir()) if path.suffix in _TYPES}


async def page(request: web.Request) -> web.Response:
    return _answer(request, _FILES[_PAGE])


async def page_file(request: web.Request) -> web.Response:
    return _answer(request, _FILES[request.match_info["file"]])


def _answer(request: web.Request, file: _File) -> web.Response:
    """304 without the content if the browser has it."""
    if any(etag.value in ("*", file.etag.value) for etag in request.if_none_match or ()):
        response = web.Response(status=304)
    else:
        response = web.Response(body=file.content, content_type=file.content_type, charset="utf-8")
    response.headers.update(_HEADERS)
    response.etag = file.etag
    return response


# The names are in the pattern, so that another one is no route and asks for a key as every other does.
_NAMES = "|".join(re.escape(name) for name in _FILES if name != _PAGE)
ROUTES = (
    Route("GET", "/", page, Access.PUBLIC, "The dashboard.", page=True),
    Route(
        "GET",
        f"/dashboard/{{file:{_NAMES}}}",
        page_file,
        Access.PUBLIC,
        "What the dashboard is made of.",
        page=True,
    ),
)
