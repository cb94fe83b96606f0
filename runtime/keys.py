"""The keys of `--api-key-file` and `--admin-key-file`. Only the front reads them, and it keeps nothing but digests:
what no process holds no log, error or answer can show.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import os
import re
import stat
from dataclasses import dataclass

from manylora.runtime.config import AccessArgs
from manylora.runtime.errors import ConfigError

logger = logging.getLogger("manylora.keys")

MIN_KEY_LENGTH = 16  # a key can be tried as often as one likes
MAX_KEY_LENGTH = 1024  # it must fit into a header
MAX_FILE_BYTES = 64 * 1024  # every key costs every request a comparison
_KEY = re.compile(rb"[!-~]+")


@dataclass(frozen=True)
class Keys:
    """SHA-256 digests of the keys. api: of those who may use the server; admin: of those who may also change it."""

    api: tuple[bytes, ...] = ()
    admin: tuple[bytes, ...] = ()


def read_keys(access: AccessArgs) -> Keys:
    """The keys of a server. Raises ConfigError in one line that names flag, file and line, never a key."""
    api, admin = _read("api_key_file", access.api_key_file), _read("admin_key_file", access.admin_key_file)
    if set(api) & set(admin):
        raise ConfigError(
            "--api-key-file and --admin-key-file have a key in common; who holds it would be an admin",
            param="admin_key_file",
        )
    return Keys(api, admin)


def is_one_of(token: str, digests: tuple[bytes, ...]) -> bool:
    """Whether `token` is a key. Takes as long whichever it is, and however much of it is right."""
    digest = hashlib.sha256(token.encode(errors="surrogatepass")).digest()
    found = False
    for known in digests:
        found |= hmac.compare_digest(digest, known)
    return found


def _read(flag: str, path: str | None) -> tuple[bytes, ...]:
    if path is None:
        return ()
    place = f"--{flag.replace('_', '-')} {path}"
    try:
        # Opening a FIFO must not wait for its writer.
        with open(
            path, "rb", buffering=0, opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)
        ) as file:
            status = os.fstat(file.fileno())
            data = file.read(MAX_FILE_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
    except (OSError, ValueError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or "no valid path"
        raise ConfigError(f"{place} cannot be read: {reason}", param=flag) from None
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{place} is not a regular file", param=flag)
    if status.st_mode & stat.S_IWOTH:
        raise ConfigError(f"{place} can be written by every user of this machine", param=flag)
    if status.st_mode & stat.S_IROTH:  # so are mounted secrets, in a container with one user
        logger.warning("%s can be read by every user of this machine", place)
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"{place} is longer than {MAX_FILE_BYTES} bytes", param=flag)
    digests = [_digest(line, f"{place}, line {number}", flag) for number, line in _key_lines(data)]
    if not digests:
        raise ConfigError(f"{place} holds no key", param=flag)
    return tuple(dict.fromkeys(digests))


def _key_lines(data: bytes) -> list[tuple[int, bytes]]:
    """Line number and text of every line that is neither blank nor a comment."""
    lines = [(number, line.strip()) for number, line in enumerate(data.split(b"\n"), 1)]
    return [(number, line) for number, line in lines if line and not line.startswith(b"#")]


def _digest(key: bytes, place: str, flag: str) -> bytes:
    if not _KEY.fullmatch(key):
        raise ConfigError(f"{place}: a key is visible ASCII characters without blanks", param=flag)
    if not MIN_KEY_LENGTH <= len(key) <= MAX_KEY_LENGTH:
        raise ConfigError(
            f"{place}: a key has {MIN_KEY_LENGTH} to {MAX_KEY_LENGTH} characters, this one {len(key)}",
            param=flag,
        )
    return hashlib.sha256(key).digest()
