"""aiohttp's connection, but for what it answers where it cannot even make a request of what arrived: that is JSON too."""

from __future__ import annotations

from http import HTTPStatus

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http_exceptions import HttpProcessingError, InvalidURLError

from manylora.runtime.errors import ErrorInfo, ExpectationFailedError, MalformedHttpError, ManyloraError
from manylora.runtime.http.common import error_response


async def heed_expectation(request: web.Request) -> web.Response | None:
    """Tell the client to go on with its body, or refuse: aiohttp asks before any middleware, so not by raising."""
    expected = request.headers.get(hdrs.EXPECT, "")
    if request.version != HttpVersion11:  # HTTP/1.0 has no such header
        return None
    if expected.lower() != "100-continue":
        return _unknown_expectation(request)
    await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    request.writer.output_size = 0  # nothing of the answer was sent yet
    return None


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
            info = MalformedHttpError(_reason(exc)).info()
        else:
            info = ErrorInfo(ManyloraError.code, HTTPStatus(plain.status).phrase, plain.status)
        response = error_response(info)
        response.force_close()
        return response

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """Send the answer. Where there is no route, nor therefore our `heed_expectation`, aiohttp refuses in plain text."""
        if isinstance(resp, web.HTTPExpectationFailed):
            resp = _unknown_expectation(request)
        return await super().finish_response(request, resp, start_time)


def _unknown_expectation(request: web.BaseRequest) -> web.Response:
    expected = request.headers.get(hdrs.EXPECT, "")
    return error_response(ExpectationFailedError(f"Unknown Expect: {expected}", param="Expect").info())


def _reason(error: HttpProcessingError) -> str:
    """What is wrong, without what was sent: aiohttp quotes that after a colon, or as all there is."""
    if isinstance(error, InvalidURLError):
        return "The request's target is no URL."
    reason = error.message.partition(":")[0].strip(" .\n")
    return f"{reason or type(error).__name__}."
