"""A small client of the routes below /v1/adapters, for the command line: the standard library's HTTP and nothing else."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

from manylora.runtime.errors import ConfigError, ErrorInfo, RemoteError


class NoAnswerError(Exception):
    """The server could not be reached, or what answered is no manylora."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would take the admin key along."""

    def redirect_request(self, *_args: Any, **_kwargs: Any) -> None:
        return None


class AdapterClient:
    """`url`: of the server; `key`: sent as a bearer token; `timeout_s`: without a byte from the server, None: for ever."""

    def __init__(self, url: str, key: str | None = None, timeout_s: float | None = None) -> None:
        """Raises ConfigError if `url` is none of a server."""
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._headers = {"Content-Type": "application/json"}
        if key is not None:
            self._headers["Authorization"] = f"Bearer {key}"
        self._opener = urllib.request.build_opener(_NoRedirect)
        try:
            parts = urlsplit(self.url)
            usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise ConfigError(f"--url {url}: expected http://HOST:PORT or https://HOST:PORT")

    def list(self) -> list[dict[str, Any]]:
        return self._call("GET", None)["data"]

    def load(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        return self._call("PUT", name, settings)

    def update(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        return self._call("PATCH", name, settings)

    def unload(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        return self._call("DELETE", name, settings)

    def _call(self, method: str, name: str | None, body: dict[str, Any] | None = None) -> Any:
        """The server's answer. Raises RemoteError if it refuses, NoAnswerError if there is none."""
        path = (
            f"/v1/adapters/{quote(name, safe='', errors='surrogateescape')}"
            if name is not None
            else "/v1/adapters"
        )
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, self._headers, method=method)
        try:
            with self._opener.open(request, timeout=self._timeout_s) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            with error:
                raise _refusal(self.url, error.code, error.read()) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
            raise NoAnswerError(f"no answer from {self.url}: {reason}") from error
        except ValueError as error:
            raise NoAnswerError(f"the answer of {self.url} is not JSON") from error


def read_key(path: str) -> str:
    """The first line of a key file that says something. Raises ConfigError."""
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--admin-key-file {path} cannot be read: {error}") from error
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"--admin-key-file {path} holds no key")
    if not (keys[0].isascii() and keys[0].isprintable()):
        raise ConfigError(f"--admin-key-file {path}: a key is of printable ASCII characters")
    return keys[0]


def _refusal(url: str, status: int, body: bytes) -> Exception:
    try:
        error = json.loads(body)["error"]
        return RemoteError(ErrorInfo(str(error["code"]), str(error["message"]), status, error.get("param")))
    except (ValueError, KeyError, TypeError, AttributeError):
        return NoAnswerError(f"{url} answered {status}, and not as manylora does")
