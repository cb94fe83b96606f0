"""When kernels are compiled: many at once before a server is ready, and never, unless the log says so, while it serves."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from triton import AsyncCompileMode, knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITCallable, JITFunction

_MOST_THREADS = 16  # beyond, they wait for each other in the part of the compiler that is Python
_ALIGNMENT = 16  # bytes; what Triton asks of a pointer


@contextmanager
def compiling_ahead() -> Iterator[None]:
    """In this block every launch has its kernel compiled by some other thread, and none is executed.

    At its end all are compiled, and later launches find them. None is executed, not even one that was compiled before:
    on memory that others should have written it could go anywhere. So what kernels write is undefined in the block, and
    nothing there may use it as an index. Raises the first error of a compilation; those of the block itself come first.
    Not for several threads at once, nor under the interpreter.
    """
    with _Compilers(min(_MOST_THREADS, len(os.sched_getaffinity(0))), "compiler") as compilers:
        # Errors are raised below: Triton 3.6, if it did that, would stay in this mode for ever.
        mode = AsyncCompileMode(compilers, ignore_errors=True)
        compilations: list[Future[Any]] = mode.raw_futures
        with _parsing_in_turn(), mode, _launches_only_compile():
            yield
    for compilation in compilations:
        compilation.result()


class _Compilers(ThreadPoolExecutor):
    """Threads that compile not only a kernel but also its launcher, for which Triton 3.6 runs the C compiler."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        return super().submit(_with_launcher, fn, *args, **kwargs)


def _with_launcher(compile_kernel: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    kernel = compile_kernel(*args, **kwargs)
    target: Any = driver.active
    target.launcher_cls(kernel.src, kernel.metadata)  # on disk now, where the first launch looks for it
    return kernel


@contextmanager
def _parsing_in_turn() -> Iterator[None]:
    """No two threads make Python's syntax trees at a time: before 3.11.5 that fails now and then (CPython issue 106905)."""
    parse: Callable[..., Any] = JITCallable.parse
    in_turn = threading.RLock()

    def parse_in_turn(function: Any) -> Any:
        with in_turn:
            return parse(function)

    JITCallable.parse = parse_in_turn  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        JITCallable.parse = parse  # pyright: ignore[reportAttributeAccessIssue]


@contextmanager
def _launches_only_compile() -> Iterator[None]:
    """`kernel[grid](…)` is `kernel.run(…, warmup=False)`, and no setting of Triton's makes that a compilation alone."""
    run: Callable[..., Any] = JITFunction.run
    known: set[Hashable] = set()

    def compile_only(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        # A step launches the same kernels in each of its layers, and Triton takes long to see that one is on its way.
        key = (kernel, *map(_kind, args), *options.items())
        if key not in known:
            known.add(key)
            run(kernel, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compile_only  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        JITFunction.run = run  # pyright: ignore[reportAttributeAccessIssue]


def _kind(argument: Any) -> Hashable:
    """All of an argument that a compilation can depend on, and more."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % _ALIGNMENT
    return type(argument), argument


def report_compilations(report: Callable[[str], object]) -> None:
    """From now on, call `report` with the name and types of every kernel that is compiled, or loaded from the cache."""

    def compiled(*, repr: str, **_: Any) -> None:
        report(repr)

    knobs.runtime.jit_post_compile_hook = compiled
