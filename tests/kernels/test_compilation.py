"""Kernels are compiled ahead, by several threads and without being launched; late compilations are noticed.

Triton's own compiler and launch code at work, on a GPU that is only pretended.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from triton import knobs
from triton.runtime.jit import JITCallable, JITFunction

from manylora.kernels import compilation
from manylora.kernels.activation_triton import _silu_and_mul, silu_and_mul
from manylora.kernels.compilation import compiling_ahead, report_compilations
from manylora.kernels.rms_norm_triton import fused_add_rms_norm, rms_norm
from tests.kernels.compiling import PretendedHopper, pretended_hopper

torch.set_num_threads(1)
X = torch.ones(2, 64)
RUN = JITFunction.run


@triton.jit
def _store(out, size):
    tl.store(out, size)


@triton.jit
def _broken(out):
    tl.static_assert(False, "this one cannot be compiled")


store: Any = _store
broken: Any = _broken


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[PretendedHopper]:
    """With nothing compiled in memory or on disk, and cores for several threads."""
    monkeypatch.setattr(knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(4)))
    with pretended_hopper() as hopper:
        yield hopper


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that are compiled from now on."""
    names: list[str] = []
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", None)  # undone behind the test
    report_compilations(names.append)
    return names


def launch_some() -> None:
    silu_and_mul(X)
    rms_norm(X, X[0], 1e-5)
    fused_add_rms_norm(X, X.clone(), X[0], 1e-5)
    silu_and_mul(X)


def launch_ahead(*launches: Callable[[], object]) -> None:
    with compiling_ahead():
        for launch in launches:
            launch()


def test_a_compiled_kernel_is_reported(compiled: list[str]) -> None:
    hook: Any = knobs.runtime.jit_post_compile_hook
    name = "_silu_and_mul[num_warps=4]"
    hook(key="", repr=name, fn=_silu_and_mul, compile={}, is_manual_warmup=False, already_compiled=False)
    assert compiled == [name]


def test_nothing_is_launched_and_later_nothing_compiled(hopper: PretendedHopper, compiled: list[str]) -> None:
    with compiling_ahead():
        launch_some()
    assert len(compiled) == 3
    assert not hopper.launched
    launch_some()
    assert len(compiled) == 3
    assert hopper.launched == ["_silu_and_mul", "_rms_norm", "_fused_add_rms_norm", "_silu_and_mul"]


def test_launchers_are_made_ahead_too(hopper: PretendedHopper) -> None:
    """Triton 3.6 has the C compiler make them, and finds them on disk later."""
    with compiling_ahead():
        launch_some()
    assert sorted(name for name, _ in hopper.launchers) == [
        "_fused_add_rms_norm",
        "_rms_norm",
        "_silu_and_mul",
    ]
    assert threading.current_thread().name not in {thread for _, thread in hopper.launchers}


def test_kernels_are_compiled_side_by_side(hopper: PretendedHopper, monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3, timeout=60)
    compile_kernel: Callable[..., Any] = compilation._with_launcher

    def meet_and_compile(*args: Any) -> Any:
        together.wait()
        return compile_kernel(*args)

    monkeypatch.setattr(compilation, "_with_launcher", meet_and_compile)
    with compiling_ahead():
        launch_some()
    assert len({thread for _, thread in hopper.launchers}) == 3


def test_what_was_compiled_before_is_not_launched_either(hopper: PretendedHopper) -> None:
    silu_and_mul(X)
    with compiling_ahead():
        silu_and_mul(X)
    assert hopper.launched == ["_silu_and_mul"]


def test_every_kind_of_arguments_is_compiled(hopper: PretendedHopper, compiled: list[str]) -> None:
    """Triton tells numbers that are 1, those that 16 divides and the others apart, and pointers likewise."""
    places = [torch.zeros(8), torch.zeros(8)[1:], torch.zeros(8, dtype=torch.int64)]
    calls = [(place, size) for place in places for size in (1, 16, 17, 1 << 40)]

    def launch_all() -> None:
        for call in calls:
            store[(1,)](*call)
        store[(1,)](*calls[0], num_warps=8)

    with compiling_ahead():
        launch_all()
    kinds = len(compiled)
    launch_all()
    assert kinds == len(compiled) == len(calls) + 1
    assert len(hopper.launched) == len(calls) + 1


def test_a_kernel_from_disk_is_not_launched_either(hopper: PretendedHopper, compiled: list[str]) -> None:
    silu_and_mul(X)
    with pretended_hopper() as other:
        with compiling_ahead():
            silu_and_mul(X)
        assert not other.launched
    assert len(compiled) == 2


def test_an_error_of_the_compiler_comes_out(hopper: PretendedHopper, compiled: list[str]) -> None:
    with pytest.raises(triton.CompilationError, match="cannot be compiled"):
        launch_ahead(lambda: broken[(1,)](X), launch_some)
    assert JITFunction.run is RUN
    silu_and_mul(X)
    store[(1,)](X, 1)
    assert len(compiled) == 4
    assert hopper.launched == ["_silu_and_mul", "_store"]


def test_an_error_of_the_block_comes_out_first(hopper: PretendedHopper) -> None:
    with pytest.raises(ZeroDivisionError):
        launch_ahead(lambda: broken[(1,)](X), lambda: 1 // 0)
    assert JITFunction.run is RUN
    silu_and_mul(X)
    assert hopper.launched == ["_silu_and_mul"]


def test_one_thread_parses_at_a_time(hopper: PretendedHopper, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.11 before 3.11.5 mixes up two syntax trees that are made at once."""
    parse: Any = JITCallable.parse
    inside: list[int] = []
    most: list[int] = []

    def slow_parse(function: Any) -> Any:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.01)
        tree = parse(function)
        inside.pop()
        return tree

    monkeypatch.setattr(JITCallable, "parse", slow_parse)
    with compiling_ahead():
        launch_some()
    assert len(most) > 2
    assert max(most) == 1
