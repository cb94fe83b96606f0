"""The LoRA and sampling kernels compile for Hopper, with copies of 16 bytes and as many programs on an SM as are launched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.lora_expand_triton import lora_expand
from manylora.kernels.lora_shrink_triton import decode_launch, lora_shrink
from manylora.kernels.lora_work import LoRAWork
from manylora.kernels.lora_work_triton import list_work
from manylora.kernels.sampling_triton import sample, uniform
from tests.kernels.compiling import compiled_for_hopper

torch.set_num_threads(1)
BF16 = torch.bfloat16
SHARED_OF_AN_SM, RESERVED = 228 << 10, 1 << 10  # bytes; the second of every program
SITES = {"qkv": (4096, (4096, 1024, 1024)), "gate_up": (4096, (14336, 14336)), "down": (14336, (4096,))}


def compiled_site(
    num_tokens: int, features: int, out_sizes: tuple[int, ...], apart: bool = False
) -> dict[str, Any]:
    ids = torch.zeros(4, dtype=torch.int64)
    pages, modules = torch.zeros(64, dtype=BF16), len(out_sizes)
    offsets = torch.zeros(4, 2, 7, 2, dtype=torch.int64)[:, 1, :modules, 0]
    widths = torch.zeros(4, 2, 7, dtype=torch.int32)[:, 1, :modules]
    scalings = torch.zeros(4, 2, 7)[:, 1, :modules]
    x, y = (torch.zeros(num_tokens, size, dtype=BF16) for size in (features, sum(out_sizes)))
    with compiled_for_hopper() as compiled:
        work = LoRAWork(torch.zeros(8, 4, dtype=torch.int64), ids, 4, num_tokens, 48)
        list_work(work)
        planes = work.planes(features, 16 * modules)
        lora_shrink(x, pages, offsets, widths, work, planes, 1)
        tables = (offsets, widths, scalings)
        lora_expand(planes[None], pages, *tables, work, y, out_sizes, behind_shrink=apart, adds=not apart)
    return compiled


@pytest.mark.parametrize(("num_tokens", "apart"), [(1, True), (64, True), (64, False), (256, True)])
@pytest.mark.parametrize("site", SITES)
def test_decode_copies_weights_16_bytes_at_a_time_and_ahead(site: str, num_tokens: int, apart: bool) -> None:
    features, out_sizes = SITES[site]
    compiled = compiled_site(num_tokens, features, out_sizes, apart)
    assert compiled.keys() == {"_list_work", "_lora_shrink", "_lora_expand_decode"}
    check_copies(compiled["_lora_shrink"], decode_launch(16 * len(out_sizes)).programs)
    expand = compiled["_lora_expand_decode"]
    check_copies(expand, 4)
    assert "cp.async.bulk.prefetch.L2" in expand.asm["ptx"]
    check_y(expand)
    for kernel in (compiled["_lora_shrink"], expand):
        assert "mma" in kernel.asm["ptx"]


@pytest.mark.parametrize("site", SITES)
def test_prefill_copies_weights_16_bytes_at_a_time_and_ahead(site: str) -> None:
    compiled = compiled_site(300, *SITES[site])
    assert compiled.keys() == {"_list_work", "_lora_shrink", "_lora_expand"}
    check_copies(compiled["_lora_shrink"], 2)
    check_copies(compiled["_lora_expand"], 2)
    check_y(compiled["_lora_expand"])


def check_copies(kernel: Any, programs: int) -> None:
    code = kernel.asm["ptx"]
    assert "cp.async.cg.shared.global" in code
    assert "ld.global.b16" not in code
    assert programs * (kernel.metadata.shared + RESERVED) <= SHARED_OF_AN_SM


def check_y(kernel: Any) -> None:
    assert "ld.global.v4.b32" in kernel.asm["ptx"]
    assert "st.global.v4.b32" in kernel.asm["ptx"]


def test_sampling() -> None:
    columns = [torch.zeros(4) for _ in range(4)]
    ids = torch.zeros(4, dtype=torch.int64)
    with compiled_for_hopper() as compiled:
        sample(torch.zeros(4, 128256), columns[0], ids, *columns[1:])
        uniform(ids, ids, ids, ids)
    assert compiled.keys() == {"_sample", "_uniform"}
    assert "cp.async.cg.shared.global" in compiled["_sample"].asm["ptx"]
