"""Noticing kernels that are compiled while a server runs: each makes a step wait for as long as a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from triton import knobs


def report_compilations(report: Callable[[str], object]) -> None:
    """From now on, call `report` with the name and types of every kernel that is compiled, or loaded from the cache."""

    def compiled(*, repr: str, **_: Any) -> None:
        report(repr)

    knobs.runtime.jit_post_compile_hook = compiled
