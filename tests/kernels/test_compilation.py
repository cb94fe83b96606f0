"""Late compilations are noticed: by Triton's own hook, called as Triton calls it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton")

from triton import knobs

from manylora.kernels.activation_triton import _silu_and_mul
from manylora.kernels.compilation import report_compilations


def test_a_compiled_kernel_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    hook_before = knobs.runtime.jit_post_compile_hook
    reported: list[str] = []
    report_compilations(reported.append)
    hook: Any = knobs.runtime.jit_post_compile_hook
    monkeypatch.setattr(knobs.runtime, "jit_post_compile_hook", hook_before)
    name = "_silu_and_mul[num_warps=4]"
    hook(key="", repr=name, fn=_silu_and_mul, compile={}, is_manual_warmup=False, already_compiled=False)
    assert reported == [name]
