"""Fixtures of the tests of processes."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture
def short_dir() -> Iterator[Path]:
    """A directory whose path leaves room for a socket's name; pytest's own is too long."""
    with tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as path:
        yield Path(path)
