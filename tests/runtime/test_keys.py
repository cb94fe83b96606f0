"""The files with keys: what is read from them, and the one line for what cannot be."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from manylora.runtime.config import AccessArgs
from manylora.runtime.errors import ConfigError
from manylora.runtime.keys import MAX_FILE_BYTES, Keys, is_one_of, read_keys

KEY, OTHER = "abcdefghijklmnop", "sk-~!\"#$%&'()*+,-./0123456789"


def key_file(path: Path, data: str | bytes, mode: int = 0o600) -> str:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    path.chmod(mode)
    return str(path)


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def refusal(access: AccessArgs) -> str:
    with pytest.raises(ConfigError) as caught:
        read_keys(access)
    assert "\n" not in caught.value.message
    assert caught.value.__cause__ is None
    return caught.value.message


def test_no_files_no_keys() -> None:
    assert read_keys(AccessArgs()) == Keys()


def test_blank_lines_and_comments_are_no_keys(tmp_path: Path) -> None:
    api = key_file(tmp_path / "api", f"# of the team\n\n  {KEY}\t\r\n  # old\n{OTHER}\n{KEY}")
    admin = key_file(tmp_path / "admin", "0123456789-admin")
    keys = read_keys(AccessArgs(api_key_file=api, admin_key_file=admin))
    assert keys == Keys((digest(KEY), digest(OTHER)), (digest("0123456789-admin"),))
    assert KEY not in repr(keys)
    assert is_one_of(KEY, keys.api)
    assert is_one_of(OTHER, keys.api)
    assert not is_one_of(KEY, keys.admin)
    assert not is_one_of("", keys.api)


@pytest.mark.parametrize(
    ("data", "mode", "problem"),
    [
        ("", 0o600, " holds no key"),
        ("\n# nothing\n", 0o600, " holds no key"),
        (f"{KEY}\nshort-secret\n", 0o600, ", line 2: a key has 16 to 1024 characters, this one 12"),
        ("secret" * 200, 0o600, ", line 1: a key has 16 to 1024 characters, this one 1200"),
        (f"\n{KEY} secret\n", 0o600, ", line 2: a key is visible ASCII characters without blanks"),
        ("schlüssel-secret-0123", 0o600, ", line 1: a key is visible ASCII characters without blanks"),
        (b"\xff\xfesecret-0123456789", 0o600, ", line 1: a key is visible ASCII characters without blanks"),
        (f"{KEY}\n".encode() * 4000, 0o600, f" is longer than {MAX_FILE_BYTES} bytes"),
        (KEY, 0o602, " can be written by every user of this machine"),
    ],
)
def test_a_bad_file_is_one_line_without_a_key(
    tmp_path: Path, data: str | bytes, mode: int, problem: str
) -> None:
    path = key_file(tmp_path / "keys", data, mode)
    assert refusal(AccessArgs(api_key_file=path)) == f"--api-key-file {path}{problem}"


@pytest.mark.parametrize("flag", ["api_key_file", "admin_key_file"])
def test_a_path_that_is_no_file(tmp_path: Path, flag: str) -> None:
    option = "--" + flag.replace("_", "-")
    os.mkfifo(tmp_path / "fifo")
    for path, problem in {
        "": "cannot be read: No such file or directory",
        str(tmp_path / "none"): "cannot be read: No such file or directory",
        str(tmp_path): "cannot be read: Is a directory",
        str(tmp_path / "fifo"): "is not a regular file",
        "a\0b": "cannot be read: no valid path",
    }.items():
        assert refusal(msgspec.structs.replace(AccessArgs(), **{flag: path})) == f"{option} {path} {problem}"


def test_a_key_in_both_files(tmp_path: Path) -> None:
    api = key_file(tmp_path / "api", f"{OTHER}\n{KEY}\n")
    admin = key_file(tmp_path / "admin", KEY)
    message = refusal(AccessArgs(api_key_file=api, admin_key_file=admin))
    assert message.startswith("--api-key-file and --admin-key-file have a key in common")
    assert KEY not in message


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o640, False), (0o644, True)])
def test_a_file_that_everybody_may_read_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: int, warned: bool
) -> None:
    path = key_file(tmp_path / "keys", KEY, mode)
    assert read_keys(AccessArgs(api_key_file=path)).api == (digest(KEY),)
    assert [record.getMessage() for record in caplog.records] == (
        [f"--api-key-file {path} can be read by every user of this machine"] if warned else []
    )
