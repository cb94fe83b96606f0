"""The kernels compile for Hopper, with loads of 16 bytes and tiles that fit its memory, as an H200 would launch them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels import paged_decode_triton, paged_prefill_triton
from manylora.kernels.activation_triton import silu_and_mul
from manylora.kernels.addend import Addend
from manylora.kernels.linear_triton import linear
from manylora.kernels.rms_norm_triton import fused_add_rms_norm, rms_norm
from manylora.kernels.rope_and_store_triton import rope_and_store
from tests.kernels.compiling import compiled_for_hopper

torch.set_num_threads(1)
BF16 = torch.bfloat16
SHARED_OF_AN_SM, RESERVED = 228 << 10, 1 << 10  # bytes; the second of every program
HEADS, KV_HEADS, HEAD_DIM, PAGE_SIZE = 32, 8, 128, 16
SMS = 132


DECODE = paged_decode_triton.Launch(2 * SMS, 128, 4, 2)


@pytest.fixture(scope="module", params=[False, True], ids=["alone", "with an addend"])
def kernels(request: pytest.FixtureRequest) -> dict[str, Any]:
    q, k, v, cache = projected()
    ids = torch.zeros(4, dtype=torch.int64)
    x, weight = torch.zeros(4, 4096, dtype=BF16), torch.zeros(4096, dtype=BF16)
    addend = Addend(torch.zeros(4, 6144, dtype=BF16), ids.int()) if request.param else None
    with compiled_for_hopper() as compiled:
        rope_and_store(q, k, v, torch.zeros(8, HEAD_DIM), ids, cache, ids, addend)
        rms_norm(x, weight, 1e-5)
        fused_add_rms_norm(x, x.clone(), weight, 1e-5, addend)
        silu_and_mul(x, addend)
        linear(x, torch.zeros(6144, 4096, dtype=BF16))
    return compiled


@pytest.fixture(scope="module")
def attention() -> dict[str, Any]:
    """`_prefill`, and `_decode` of few and of many rows."""
    found: dict[str, Any] = {}
    for name, num_rows in (("few", 4), ("many", 64)):
        q, _, _, cache = projected(num_rows)
        table, out = torch.zeros(4, 7, dtype=torch.int64), torch.zeros_like(q)
        rows = torch.zeros(num_rows, 4, dtype=torch.int64)
        with compiled_for_hopper() as compiled:
            paged_decode_triton.paged_decode_attention(
                q, cache, table, rows[:, 0], rows[:, 1].contiguous(), 1.0, out, DECODE
            )
            prefill = paged_prefill_triton.Launch(128, 64, 8, 3)
            paged_prefill_triton.paged_prefill_attention(q, cache, table, rows, 1.0, out, prefill)
        found |= {f"_decode of {name}": compiled["_decode"], "_prefill": compiled["_prefill"]}
    return found


def projected(num_rows: int = 4) -> tuple[torch.Tensor, ...]:
    """q, k, v as parts of one projection, and a layer of a cache."""
    qkv = torch.zeros(num_rows, HEADS + 2 * KV_HEADS, HEAD_DIM, dtype=BF16)
    cache = torch.zeros(2, 2, 2, KV_HEADS, PAGE_SIZE, HEAD_DIM, dtype=BF16)[:, 1]
    return (*qkv.split((HEADS, KV_HEADS, KV_HEADS), dim=1), cache)


@pytest.mark.parametrize("name", ["_decode of few", "_decode of many"])
def test_every_program_of_decode_has_its_place(name: str, attention: dict[str, Any]) -> None:
    shared = attention[name].metadata.shared + RESERVED
    assert DECODE.programs // SMS * shared <= SHARED_OF_AN_SM


# A tensor core of Hopper still reads the tile before the one at hand: one buffer more.
@pytest.mark.parametrize(
    ("name", "buffers"), [("_decode of few", "1x128"), ("_decode of many", "1x128"), ("_prefill", "3x64")]
)
def test_keys_and_values_are_copied_while_others_are_computed(
    name: str, buffers: str, attention: dict[str, Any]
) -> None:
    """The compiler's own pipeline; with fewer stages every copy would be waited for at once."""
    assert f"memdesc<{buffers}x{HEAD_DIM}xbf16" in attention[name].asm["ttgir"]
    assert "cp.async.cg.shared.global" in attention[name].asm["ptx"]
    assert attention[name].metadata.shared + RESERVED <= SHARED_OF_AN_SM


def test_prefill_uses_the_tensor_cores_of_hopper(attention: dict[str, Any]) -> None:
    assert "wgmma.mma_async" in attention["_prefill"].asm["ptx"]


@pytest.mark.parametrize("name", ["_decode of few", "_decode of many"])
def test_partial_results_are_stored_before_they_are_counted_and_read_after(
    name: str, attention: dict[str, Any]
) -> None:
    """All threads meet before one of them counts, and again before the parts are read, past this SM's own cache."""
    before, _, after = attention[name].asm["ptx"].partition("atom.global.gpu.acq_rel.add")
    stored = before.rindex("st.global")
    assert "bar.sync" in before[stored:]
    assert "ld.global.cg" not in before
    assert "bar.sync" in after[: after.index("ld.global.cg")]


@pytest.mark.parametrize("name", ["_rope_and_store", "_rms_norm", "_fused_add_rms_norm", "_silu_and_mul"])
def test_pointwise_kernels_move_16_bytes_at_a_time(name: str, kernels: dict[str, Any]) -> None:
    code = kernels[name].asm["ptx"]
    assert "ld.global.v4.b32" in code
    assert "st.global.v4.b32" in code
    assert "ld.global.b16" not in code


def test_a_few_rows_stream_the_weight(kernels: dict[str, Any]) -> None:
    """By the tensor cores of Hopper, six tiles ahead, the first before the wait for the kernel that writes x."""
    ptx = kernels["_linear"].asm["ptx"]
    assert "wgmma" in ptx
    assert (
        "memdesc<7x64x128xbf16" in kernels["_linear"].asm["ttgir"]
        or "memdesc<6x64x128xbf16" in kernels["_linear"].asm["ttgir"]
    )
    assert ptx.index("prefetch.global.L2") < ptx.index("griddepcontrol.wait") < ptx.index("cp.async")


@pytest.mark.parametrize(
    "name", ["_rms_norm", "_fused_add_rms_norm", "_silu_and_mul", "_rope_and_store", "_linear"]
)
def test_a_kernel_waits_for_the_one_before_it(name: str, kernels: dict[str, Any]) -> None:
    ptx = kernels[name].asm["ptx"]
    assert (
        ptx.index("griddepcontrol.wait")
        < ptx.index("griddepcontrol.launch_dependents")
        < ptx.index("st.global")
    )
