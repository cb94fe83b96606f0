"""The private directories of a server: whose they are, and who removes them."""

import os
import stat
import time
from pathlib import Path

import pytest

from manylora.runtime.scratch import ScratchDir, make_run_dir, make_shm_dir

LONG_AGO = time.time() - 3600


def age(path: Path) -> None:
    os.utime(path, (LONG_AGO, LONG_AGO))


def test_it_is_private_and_goes_with_what_is_in_it(short_dir: Path) -> None:
    scratch = ScratchDir(short_dir)
    assert stat.S_IMODE(scratch.path.stat().st_mode) == 0o700
    (scratch.path / "adapter").write_bytes(b"x")
    scratch.remove()
    assert not list(short_dir.iterdir())


def test_what_a_killed_server_left_is_removed_by_the_next(short_dir: Path) -> None:
    killed = short_dir / "manylora-killed"
    killed.mkdir()
    (killed / "adapter").write_bytes(b"x")
    age(killed)
    young = short_dir / "manylora-young"
    young.mkdir()
    other = short_dir / "somebody-else"
    other.mkdir()
    age(other)
    alive = ScratchDir(short_dir)
    assert not killed.exists()
    age(alive.path)
    next_one = ScratchDir(short_dir)
    assert alive.path.exists(), "it is locked"
    assert young.exists(), "it may not be locked yet"
    assert other.exists(), "it is not ours"
    alive.remove()
    next_one.remove()


def test_a_link_is_not_followed(short_dir: Path) -> None:
    precious = short_dir / "precious"
    precious.mkdir()
    (short_dir / "manylora-link").symlink_to(precious)
    os.utime(short_dir / "manylora-link", (LONG_AGO, LONG_AGO), follow_symlinks=False)
    ScratchDir(short_dir).remove()
    assert precious.exists()


def test_the_run_directory_leaves_room_for_a_sockets_name(
    short_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(short_dir))
    near = make_run_dir()
    assert near.path.parent == short_dir
    near.remove()
    deep = short_dir / ("d" * 80)
    deep.mkdir()
    for useless in (str(deep), str(short_dir / "missing"), ""):
        monkeypatch.setenv("XDG_RUNTIME_DIR", useless)
        elsewhere = make_run_dir()
        assert len(str(elsewhere.path / "supervisor-scheduler.0")) < 107
        assert short_dir not in elsewhere.path.parents
        elsewhere.remove()


def test_images_lie_in_memory() -> None:
    shm = make_shm_dir()
    assert shm.path.parent == Path("/dev/shm")
    shm.remove()
