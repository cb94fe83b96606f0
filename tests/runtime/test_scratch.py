"""The private directories of a server: whose they are, and who removes them."""

import os
import stat
from pathlib import Path

import pytest

from manylora.runtime.scratch import ScratchDir, make_run_dir, make_shm_dir


def test_it_is_private_and_goes_with_what_is_in_it(short_dir: Path) -> None:
    scratch = ScratchDir(short_dir)
    assert stat.S_IMODE(scratch.path.stat().st_mode) == 0o700
    (scratch.path / "adapter").write_bytes(b"x")
    scratch.remove()
    assert not list(short_dir.iterdir())


def killed(base: Path) -> Path:
    """What a server leaves that cannot say goodbye."""
    scratch = ScratchDir(base)
    os.close(scratch._lock)
    (scratch.path / "adapter").write_bytes(b"x")
    return scratch.path


def test_what_a_killed_server_left_is_removed_by_the_next(short_dir: Path) -> None:
    alive = ScratchDir(short_dir)
    left = killed(short_dir)
    next_one = ScratchDir(short_dir)
    assert not left.exists()
    assert alive.path.exists(), "it is locked"
    alive.remove()
    next_one.remove()


def test_nobody_elses_directory_is_removed(short_dir: Path) -> None:
    """However it is named and however old it is."""
    precious = short_dir / "manylora-adapters"
    precious.mkdir()
    (precious / "adapter").write_bytes(b"x")
    os.utime(precious, (0, 0))
    (short_dir / "manylora-empty").mkdir()
    ScratchDir(short_dir).remove()
    assert sorted(path.name for path in short_dir.iterdir()) == ["manylora-adapters", "manylora-empty"]
    assert (precious / "adapter").read_bytes() == b"x"


def test_a_link_is_not_followed(short_dir: Path, tmp_path: Path) -> None:
    left = killed(tmp_path)
    (short_dir / "manylora-link").symlink_to(left)
    ScratchDir(short_dir).remove()
    assert (left / "adapter").exists()


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
