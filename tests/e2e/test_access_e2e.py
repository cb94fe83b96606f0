"""Keys and roots of a real server on the demo model."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manylora import Engine
from manylora.runtime.errors import ConfigError
from tests.server import Server, environment_of_a_program, running_server, session_members

DEMO = Path(__file__).resolve().parents[2] / "demo"
USER_KEY, ADMIN_KEY = "the-users-key-0123456789", "the-admins-key-0123456789"
STRANGE_KEY = "nobodys-key-0123456789"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key files; a root with an adapter and with links; adapters outside of it."""
    place = tmp_path_factory.mktemp("place")
    for name, key in (("api", USER_KEY), ("admin", ADMIN_KEY)):
        (place / f"{name}.keys").write_text(f"# {name}\n{key}\n")
        (place / f"{name}.keys").chmod(0o600)
    root, outside = place / "root", place / "outside"
    shutil.copytree(DEMO / "adapters/german", root / "german")
    shutil.copytree(DEMO / "adapters/json", outside)
    (root / "leads-out").symlink_to(outside)
    (root / "files-lead-out").mkdir()
    for file in outside.iterdir():
        (root / "files-lead-out" / file.name).symlink_to(file)
    return place


@pytest.fixture(scope="module")
def server(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running_server(
        DEMO / "model",
        "--host=0.0.0.0",
        f"--api-key-file={place / 'api.keys'}",
        f"--admin-key-file={place / 'admin.keys'}",
        f"--adapter-root={place / 'root'}",
        f"--lora-paths=bullets={DEMO / 'adapters/bullets'}",
        log_dir=tmp_path_factory.mktemp("log"),
        key=USER_KEY,
    ) as server:
        yield server


def as_who(server: Server, key: str | None, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    before, server.key = server.key, key
    try:
        reply = server.request(method, path, body)
    finally:
        server.key = before
    return reply.status, reply.body


def test_who_may_do_what(server: Server) -> None:
    text = {"text": "The capital of France is", "sampling_params": {"temperature": 0, "max_new_tokens": 1}}
    unload = {"lora_name": "ghost"}
    for key, generates, unloads in (
        (None, 401, 401),
        (STRANGE_KEY, 401, 401),
        (USER_KEY, 200, 403),
        (ADMIN_KEY, 200, 400),
    ):
        assert as_who(server, key, "POST", "/generate", text)[0] == generates
        assert as_who(server, key, "POST", "/unload_lora_adapter", unload)[0] == unloads
        assert as_who(server, key, "GET", "/health") == (200, "")


def test_adapters_come_only_from_the_root_and_the_start(server: Server, place: Path) -> None:
    def load(path: str) -> tuple[int, Any]:
        body = {"lora_name": "new", "lora_path": path, "replace": True}
        return as_who(server, ADMIN_KEY, "POST", "/load_lora_adapter", body)

    for path in ("german", str(place / "root/german"), str(DEMO / "adapters/bullets")):
        status, answer = load(path)
        assert (status, answer["loaded_adapters"]["new"]) == (200, path)
    texts: set[str] = set()
    for path in (
        str(place / "outside"),
        str(place / "nowhere"),
        "/etc",
        f"{place}/root/../outside",
        "leads-out",
    ):
        status, answer = load(path)
        assert (status, answer["success"]) == (403, False), path
        texts.add(answer["error_message"].replace(repr(path), ""))
    assert len(texts) == 1
    status, answer = load("files-lead-out")
    assert status == 403
    assert str(place / "outside") not in answer["error_message"]
    status, answer = load("org/adapter")  # not taken for the hub's
    assert (status, answer["error_message"]) == (
        400,
        f"there is no adapter directory {place}/root/org/adapter",
    )
    assert as_who(server, ADMIN_KEY, "POST", "/unload_lora_adapter", {"lora_name": "new"})[0] == 200


def test_the_keys_show_nowhere(server: Server) -> None:
    _, info = as_who(server, ADMIN_KEY, "GET", "/get_server_info")
    assert (info["api_key_file"], info["admin_key_file"], info["insecure"]) == (True, True, False)
    shown = [json.dumps(info), server.log(), *session_members(server.process.pid).values()]
    files = [file for file in server.run_dir_base.rglob("*") if file.is_file()]
    assert any(file.name.startswith("front.") for file in files)
    shown += [file.read_text() for file in files]
    for pid in session_members(server.process.pid):
        shown.append(Path(f"/proc/{pid}/environ").read_text(errors="replace"))
    assert not [text[:200] for text in shown if USER_KEY in text or ADMIN_KEY in text]


def start(*args: str) -> tuple[int, str]:
    """Exit code and stderr's last line of a server that must not come to serve."""
    result = subprocess.run(
        [sys.executable, "-m", "manylora", "serve", "--model-path", str(DEMO / "model"), "--port=0", *args],
        env=environment_of_a_program(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return result.returncode, result.stderr.splitlines()[-1]


def test_what_ends_the_start(place: Path) -> None:
    (place / "empty.keys").touch(mode=0o600)
    admin = f"--admin-key-file={place}/admin.keys"
    for args, code, message in (
        (
            ["--host=0.0.0.0", admin],
            2,
            "--host 0.0.0.0 may be reached from other machines: give --api-key-file, or --insecure to serve without "
            "keys",
        ),
        (
            [admin, f"--api-key-file={place}/none"],
            1,
            f"--api-key-file {place}/none cannot be read: No such file or directory",
        ),
        ([f"--api-key-file={place}/empty.keys"], 1, f"--api-key-file {place}/empty.keys holds no key"),
        ([f"--adapter-root={place}/none"], 1, f"--adapter-root {place}/none is not a directory"),
    ):
        assert start(*args) == (code, f"manylora: error: {message}")


def test_an_engine_has_no_use_for_keys() -> None:
    with pytest.raises(ConfigError, match="Engine serves no HTTP"):
        Engine(str(DEMO / "model"), adapter_root=["/"])
