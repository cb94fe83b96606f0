"""The two private directories of a running server: sockets, and adapter images in shared memory.

Each is locked while its server lives, so that the next server can tell what a killed one left behind and remove it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from pathlib import Path

from manylora.runtime.errors import ConfigError

_PREFIX = "manylora-"
_MARK = ".manylora-scratch"  # only what has this file is ever removed: others may name a directory alike
_LONGEST_RUN_DIR = 70  # a socket's path may have 107 bytes, its name takes up to 32


class ScratchDir:
    """A new directory (0700) below `base`. Removed by `remove`, or by a later server once this process is gone."""

    def __init__(self, base: Path) -> None:
        _remove_stale(base)
        self.path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base))
        self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        (self.path / _MARK).touch()  # once it is locked

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def make_run_dir() -> ScratchDir:
    """For sockets: below $XDG_RUNTIME_DIR, or the temporary directory where that is missing or too long a path."""
    for base in (os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp"):
        if base and len(base) + len(_PREFIX) + 9 <= _LONGEST_RUN_DIR and os.access(base, os.W_OK | os.X_OK):
            return ScratchDir(Path(base))
    raise ConfigError("neither $XDG_RUNTIME_DIR nor /tmp is a directory that this user may write to")


def make_shm_dir() -> ScratchDir:
    """For adapter images: below /dev/shm, or the temporary directory where there is none."""
    shm = Path("/dev/shm")
    return ScratchDir(shm if os.access(shm, os.W_OK | os.X_OK) else Path(tempfile.gettempdir()))


def _remove_stale(base: Path) -> None:
    """Remove what servers of this user left below `base` when they were killed."""
    for path in base.glob(_PREFIX + "*"):
        try:
            if path.lstat().st_uid != os.getuid() or not (path / _MARK).exists():
                continue
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # another server was faster, or it is not a directory
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(path, ignore_errors=True)
        except BlockingIOError:
            pass  # its server lives
        finally:
            os.close(descriptor)
