"""Compiling ahead on a CUDA device: nothing runs while it lasts, everything at once behind it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from triton import knobs

from manylora.kernels.compilation import compiling_ahead, report_compilations

pytestmark = pytest.mark.gpu


@triton.jit(do_not_specialize=["value"])
def _store(out, value):
    tl.store(out, value)


store: Any = _store


@pytest.fixture(params=["first", "last"])
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Current, as a rank's own is, in this thread alone."""
    index = 0 if request.param == "first" else torch.cuda.device_count() - 1
    with torch.cuda.device(index):
        yield torch.device("cuda", index)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)
    names: list[str] = []
    report_compilations(names.append)
    _store.device_caches.clear()
    return names


def test_a_kernel_runs_behind_the_block_alone(device: torch.device, compiled: list[str]) -> None:
    out = torch.zeros(1, dtype=torch.int64, device=device)
    with compiling_ahead():
        store[(1,)](out, 7)
    assert out.item() == 0
    assert len(compiled) == 1
    store[(1,)](out, 7)
    assert out.item() == 7
    with compiling_ahead():
        store[(1,)](out, 9)
    assert out.item() == 7
    store[(1,)](out, 9)
    assert out.item() == 9
    assert len(compiled) == 1
