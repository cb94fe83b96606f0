"""Whole deltas through the kernels: every site, sharding and rank, against the dense product."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manylora.lora.delta import LoRADelta
from manylora.lora.lora_batch import LoRABatch
from manylora.lora.page_layout import ROW_PARALLEL, SITES, module_sizes
from tests.lora.adapters import add_delta, small_geometry, small_model
from tests.lora.test_delta import NUM_TOKENS, Batch, columns, dense

torch.set_num_threads(1)
LAYER = 1


class BoardGroup:
    """One rank's end of a group whose ranks run one after another: it meets what the others left the last time.

    Threads in lockstep would not do, because the interpreter runs one kernel at a time.
    """

    def __init__(self, rank: int, size: int, board: list[torch.Tensor | None]) -> None:
        self.rank, self.size, self._board = rank, size, board

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        self._board[self.rank] = x.clone()
        return torch.stack([x if other is None else other for other in self._board])

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.copy_(self.all_gather(x).sum(0))


@pytest.mark.parametrize("sharding", ["slora", "replicated"])
@pytest.mark.parametrize("tp_size", [1, 2, 4])
@pytest.mark.parametrize("site", range(len(SITES)))
def test_deltas_of_all_ranks_together(tmp_path: Path, site: int, tp_size: int, sharding: str) -> None:
    model = small_model()
    geometry = small_geometry(model, tp_size, sharding)
    batch, sizes = Batch(tmp_path, model, geometry), module_sizes(model)
    host = batch.lora_batch()
    step = LoRABatch.on_device(host.segments, host.slices, host.max_slices, NUM_TOKENS, geometry)
    step.prepare()
    modules = SITES[site]
    row_parallel = modules[0] in ROW_PARALLEL
    x = torch.randn(NUM_TOKENS, sizes[modules[0]][0])
    shapes = [geometry.modules[module] for module in modules]
    width = sizes[modules[0]][1] if row_parallel else sum(shape.out_local for shape in shapes)
    board: list[torch.Tensor | None] = [None] * tp_size
    results: list[torch.Tensor] = []
    pools = [batch.pool(rank) for rank in range(tp_size)]
    for rank in [*range(tp_size), *range(tp_size)]:
        delta = LoRADelta(pools[rank], LAYER, site, BoardGroup(rank, tp_size, board), sharding)
        mine = columns(x, shapes[0].in_local, tp_size, rank) if row_parallel else x
        y = torch.ones(NUM_TOKENS, width)
        add_delta(delta, mine.contiguous(), y, step)
        results.append(y - 1)
    expected = [dense(batch.weights, LAYER, module, x, sizes[module][1]) for module in modules]
    if row_parallel:
        torch.testing.assert_close(sum(results[tp_size:]), expected[0], rtol=1e-5, atol=1e-5)
        return
    for rank, result in enumerate(results[tp_size:]):
        mine = [
            columns(delta, shape.out_local, tp_size, rank)
            for shape, delta in zip(shapes, expected, strict=True)
        ]
        torch.testing.assert_close(result, torch.cat(mine, 1), rtol=1e-5, atol=1e-5)
