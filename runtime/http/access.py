"""Who may call a route: one pure function of the route's level, the request's header and the server's keys."""

from __future__ import annotations

from collections.abc import Sequence

from aiohttp import hdrs, web
from aiohttp.typedefs import Handler

from manylora.runtime.errors import ForbiddenError, UnauthorizedError
from manylora.runtime.http.common import STATE
from manylora.runtime.http.route import Access
from manylora.runtime.keys import Keys, is_one_of

_FETCH_SITE = "Sec-Fetch-Site"
LEVELS = web.AppKey("levels", dict[web.AbstractRoute, Access])


def refusal(
    level: Access, authorization: Sequence[str], keys: Keys, *, cross_site: bool = False
) -> UnauthorizedError | ForbiddenError | None:
    """Why a request may not call a route of `level`; None if it may. `authorization`: every header of that
    name; cross_site: a browser says that a page of somebody else's sends it.

    Without keys everything is open. An admin key opens everything, an API key what is no admin's; the admin's routes
    too where there is no admin key. With an admin key alone the users' routes stay open. What is open is so to programs
    and to our own page: a page of the web that a person looks at shall not reach a server on his machine.
    """
    asks_admin = level is Access.ADMIN and bool(keys.admin)
    if level is Access.PUBLIC:
        return None
    if not (keys.api or asks_admin):
        return (
            ForbiddenError("A page of another site sent this, and there is no key.") if cross_site else None
        )
    token = _bearer_token(authorization)
    if token is None:
        return UnauthorizedError("This needs a key: send the header `Authorization: Bearer KEY` once.")
    is_admin, is_user = is_one_of(token, keys.admin), is_one_of(token, keys.api)
    if is_admin or (is_user and not asks_admin):
        return None
    if is_user:
        return ForbiddenError("This needs an admin key; yours is an API key.")
    return UnauthorizedError("The key is not known.")


def keys_asked(level: Access, keys: Keys) -> tuple[Access, ...]:
    """Whose keys open routes of `level`: USER an API key, ADMIN an admin key. None: they are open."""
    asks_admin = level is Access.ADMIN and bool(keys.admin)
    if level is Access.PUBLIC or not (keys.api or asks_admin):
        return ()
    openers = ((Access.USER, keys.api and not asks_admin), (Access.ADMIN, keys.admin))
    return tuple(whose for whose, opens in openers if opens)


@web.middleware
async def require_key(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuse before anything of the request is looked at. What is no route asks for what a user's route asks for, so
    that without a key nobody can tell one from the other.
    """
    match = request.match_info
    if match.http_exception is not None:
        level = Access.USER
    else:
        level = request.app[LEVELS].get(match.route, Access.ADMIN)
    headers = request.headers
    error = refusal(
        level,
        headers.getall(hdrs.AUTHORIZATION, ()),
        request.app[STATE].keys,
        cross_site=headers.get(_FETCH_SITE) == "cross-site",
    )
    if error is not None:
        raise error
    return await handler(request)


def _bearer_token(authorization: Sequence[str]) -> str | None:
    """The key of the one header there is. Of several, a proxy might have checked another than we."""
    if len(authorization) != 1:
        return None
    scheme, _, token = authorization[0].strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
