"""aiohttp's connection, but for what it answers where it cannot even make a request of what arrived: that is JSON too."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from manylora.runtime.errors import ErrorInfo, MalformedHttpError, ManyloraError
from manylora.runtime.http.common import error_response

_MAX_MESSAGE_LENGTH = 200


class Connection(web.RequestHandler):
    """One client's connection."""

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = HTTPStatus.INTERNAL_SERVER_ERROR,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what the parser refuses, or to a bug in front of our own handling of errors."""
        plain = super().handle_error(request, status, exc, message)  # it logs
        if isinstance(exc, HttpProcessingError):
            info = MalformedHttpError(_first_line(exc)).info()
        else:
            info = ErrorInfo(ManyloraError.code, HTTPStatus(plain.status).phrase, plain.status)
        response = error_response(info)
        response.force_close()
        return response


def _first_line(error: HttpProcessingError) -> str:
    """What is wrong; the lines after it quote what was sent, pointing at the place."""
    line = error.message.partition("\n")[0].strip().rstrip(":") or type(error).__name__
    return f"{line[:_MAX_MESSAGE_LENGTH]}."
