"""What a decode step runs beside its layers compiles for Hopper, greedy drawing with all its loads of 16 bytes in flight."""

from __future__ import annotations

import re

import pytest
import torch

pytest.importorskip("triton")

from manylora.kernels.fill_decode_inputs_triton import fill_decode_inputs
from manylora.kernels.greedy_triton import draw_greedy
from manylora.kernels.greedy_work import PART, GreedyWork
from tests.kernels.compiling import compiled_for_hopper
from tests.kernels.decode_plans import DUMMY, PAGE_SIZE, DecodePlan, dirty_inputs

torch.set_num_threads(1)
THREADS = 128


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_greedy(dtype: torch.dtype) -> None:
    vocab = 128256
    last_token = torch.zeros(5, 16, dtype=torch.int32)[:, 13]
    work = GreedyWork(4, vocab, torch.device("cpu"))
    with compiled_for_hopper() as compiled:
        draw_greedy(torch.zeros(4, vocab, dtype=dtype), torch.zeros(4, dtype=torch.int64), last_token, work)
    code = compiled["_draw_greedy"].asm["ptx"]
    assert code.count("ld.global.v4") == PART * dtype.itemsize // (16 * THREADS)
    assert "ld.global.b16" not in code
    assert len(re.findall(r"atom[.\w]*acq_rel", code)) == 1


def test_fill_decode_inputs() -> None:
    plan = DecodePlan(9, slices_each=2)
    with compiled_for_hopper() as compiled:
        fill_decode_inputs(
            dirty_inputs(16, 2),
            plan.payload,
            plan.bounds,
            plan.last_token,
            plan.page_table,
            PAGE_SIZE,
            DUMMY,
        )
    code = compiled["_fill_decode_inputs"].asm["ptx"]
    assert code.index("st.global.b64") < code.index("bar.sync") < code.index("ld.global.b64")  # pages first
