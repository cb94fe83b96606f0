"""Programmatic dependent launch: a kernel is set up, and reads ahead, while the one before it in its stream still ends
(CUDA C++ programming guide, "Programmatic Dependent Launch and Synchronization").

A kernel launched with `overlapping` calls `wait_for_earlier` in every program and on every path. What the kernel right
before it wrote, or still reads, it may touch only after that. It calls `let_next_start`, if at all, only after its own
wait; so when a kernel runs, all but the one right before it in its stream have ended, and what those wrote may be read at
once. After a wait for another stream the same holds for the last kernels of both.
One kernel is different: `lora_shrink` beside a product lets the next start at once and waits at its end. So behind it comes
nothing but `lora_expand`, which reads only weights, tables and lists before its wait.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from manylora.kernels.gpu import HOPPER, capability

NOT_OVERLAPPING = MappingProxyType({"OVERLAPS": False})  # for the launch of a kernel with that constant


def overlapping(device: torch.device) -> dict[str, Any]:
    """Keyword arguments for the launch of a kernel with the constant OVERLAPS."""
    return {"OVERLAPS": True, "launch_pdl": True} if can_overlap(device) else {**NOT_OVERLAPPING}


def letting_next_start(device: torch.device) -> dict[str, Any]:
    """The same for a launch that itself waits for all before it to end."""
    return {"OVERLAPS": can_overlap(device)}


def can_overlap(device: torch.device) -> bool:
    """Whether dependent launches do anything: Hopper and later have them, the interpreter knows nothing of them."""
    return capability(device) >= HOPPER


@triton.jit
def wait_for_earlier(OVERLAPS: tl.constexpr):
    """Until everything before this kernel has ended and can be read."""
    if OVERLAPS:
        gdc_wait()


@triton.jit
def let_next_start(OVERLAPS: tl.constexpr):
    """The next kernel's programs may take what room there is once every program of this one has come here."""
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def prefetch_to_l2(lines, wanted):
    """Ask for the 128 bytes at each of these pointers that is `wanted`, without waiting. Never under the interpreter."""
    tl.inline_asm_elementwise(
        """
        {
            .reg .pred is_wanted;
            setp.ne.s32 is_wanted, $2, 0;
            @is_wanted prefetch.global.L2 [$1];
            mov.u32 $0, 0;
        }
        """,
        "=r,l,r",
        [lines, wanted.to(tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
