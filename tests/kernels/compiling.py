"""Compiling kernels for Hopper on a machine without a GPU. The interpreter runs what the compiler refuses."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from manylora.kernels import dependent_launch

HOPPER = GPUTarget("cuda", 90, 32)
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl")


@contextmanager
def compiled_for_hopper() -> Iterator[dict[str, Any]]:
    """Instead of being launched, kernels are compiled as that launch would have it: name -> compiled kernel."""
    compiled: dict[str, Any] = {}

    def run(kernel: JITFunction[Any], *args: Any, grid: object, warmup: bool, **constants: Any) -> None:
        options = {name: constants.pop(name) for name in OPTIONS if name in constants}
        source = _source(kernel, dict(zip(kernel.arg_names, args, strict=False)), constants)
        compiled[kernel.fn.__name__] = triton.compile(source, target=HOPPER, options=options)

    with patch.object(JITFunction, "run", run), patch.object(dependent_launch, "can_overlap", lambda _: True):
        yield compiled


class PretendedHopper:
    """What Triton asks of a GPU's driver, without a GPU: kernels are compiled as ever, their launches only counted.

    Every one is another device, for which no kernel has been compiled yet in this process.
    """

    _devices = itertools.count(1000)

    def __init__(self) -> None:
        self._device = next(self._devices)
        self.launched: list[str] = []
        self.launchers: list[tuple[str, str]] = []  # kernel, and the thread that made its launcher
        self.utils = SimpleNamespace(
            load_binary=lambda *_: (object(), 0, 0, 0, 1024),
            get_device_properties=lambda _: {"max_shared_mem": 227 << 10},
        )

    def get_current_target(self) -> GPUTarget:
        return HOPPER

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: ASTSource, metadata: Any) -> Any:
        self.launchers.append((metadata.name, threading.current_thread().name))
        return lambda *_: self.launched.append(metadata.name)


@contextmanager
def pretended_hopper() -> Iterator[PretendedHopper]:
    """Triton itself runs as if this machine had one."""
    pretended: Any = PretendedHopper()
    with patch.object(driver, "_active", pretended):
        yield pretended


def _source(kernel: JITFunction[Any], arguments: dict[str, Any], constants: dict[str, Any]) -> ASTSource:
    """With the specialisations of a launch: integers that are 1, and what 16 divides."""
    signature: dict[str, str] = {}
    values: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], list[list[Any]]] = {}
    for param in kernel.params:
        value = constants[param.name] if param.is_constexpr else arguments[param.name]
        at, free = (param.num,), not param.do_not_specialize
        aligned = free and not param.do_not_specialize_on_alignment
        if param.is_constexpr or (free and isinstance(value, int) and value == 1):
            signature[param.name], values[at] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[param.name] = POINTERS[value.dtype]
            if aligned:
                attributes[at] = [["tt.divisibility", 16]]
        elif isinstance(value, int):
            signature[param.name] = "i32"
            if aligned and value % 16 == 0:
                attributes[at] = [["tt.divisibility", 16]]
        else:
            signature[param.name] = "fp32"
    return ASTSource(kernel, signature, values, attributes)
