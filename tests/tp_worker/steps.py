"""Drives a decoder step by step as a worker does, with pages dealt out at random from a cache full of NaN."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from manylora.lora.lora_batch import LoRABatch
from manylora.tp_worker.models.decoder import Decoder, LoRALayer
from manylora.tp_worker.step_inputs import StepInputs

PAGE_SIZE = 4
Step = list[tuple[int, int]]  # (sequence, number of its next tokens), rows of several tokens first

SEQUENCE_LENGTHS = (20, 9, 33)
SCHEDULES: dict[str, list[Step]] = {
    "whole": [[(0, 20), (1, 9), (2, 33)]],
    "chunked": [
        *([(0, n)] for n in (7, 6, 4, 1, 1, 1)),
        *([(1, n)] for n in (4, 5)),
        *([(2, n)] for n in (16, 16, 1)),
    ],
    "mixed": [[(0, 17)], [(1, 8), (0, 1)], [(2, 15), (0, 1), (1, 1)], [(2, 17), (0, 1)], [(2, 1)]],
}


def sequences(vocab_size: int) -> list[list[int]]:
    """The token ids every schedule runs."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(vocab_size, (n,), generator=generator).tolist() for n in SEQUENCE_LENGTHS]


def row_ends(schedule: list[Step]) -> list[int]:
    """Which tokens of `sequences`, one sequence after another, rows end with."""
    ends: list[list[int]] = [[] for _ in SEQUENCE_LENGTHS]
    done = [sum(SEQUENCE_LENGTHS[:sequence]) for sequence in range(len(SEQUENCE_LENGTHS))]
    for sequence, num_new in (row for step in schedule for row in step):
        done[sequence] += num_new
        ends[sequence].append(done[sequence] - 1)
    return [end for of_sequence in ends for end in of_sequence]


def run_schedule(
    decoder: Decoder, schedule: list[Step], lora: LoRABatch | None = None, *, narrowed: bool = False
) -> Tensor:
    """Logits of every token of `sequences`, one sequence after another: (sum of lengths, vocab_size) on the CPU.

    narrowed: of the tokens that rows end with alone.
    """
    ids = sequences(decoder.config.vocab_size)
    cache, page_table = _empty_cache(decoder), _page_table()
    device = cache.device
    done = [0] * len(ids)
    logits: list[list[Tensor]] = [[] for _ in ids]
    for step in schedule:
        inputs = _step_inputs(step, ids, done, page_table, lora, device)
        if narrowed:
            inputs.narrow()
        hidden = decoder.forward(inputs, cache)
        parts = decoder.logits(hidden).split([1 if narrowed else num_new for _, num_new in step])
        for (sequence, num_new), part in zip(step, parts, strict=True):
            logits[sequence].append(part)
            done[sequence] += num_new
    assert tuple(done) == SEQUENCE_LENGTHS
    return torch.cat([part for of_sequence in logits for part in of_sequence]).cpu()


class SameAgain:
    """A delta that adds the layer's own product once more, so that the layer acts as if its weight were doubled."""

    def __init__(self, layer: LoRALayer) -> None:
        self.weight = layer.weight

    def begin(self, x: Tensor, batch: LoRABatch) -> Tensor | None:
        return F.linear(x, self.weight)

    def finish(self, x: Tensor, begun: Tensor | None, y: Tensor, batch: LoRABatch) -> None:
        assert begun is not None
        y += begun


def double_every_projection(decoder: Decoder) -> LoRABatch:
    """Attach `SameAgain` everywhere; returns a batch to switch it on with."""
    for _, _, layer in decoder.lora_sites():
        layer.lora = SameAgain(layer)
    nothing = torch.zeros(0, dtype=torch.int32, device=decoder.norm.weight.device)
    return LoRABatch(nothing.view(0, 4), nothing, 1)


def _num_pages() -> list[int]:
    return [-(-length // PAGE_SIZE) for length in SEQUENCE_LENGTHS]


def _page_table() -> Tensor:
    """Every sequence's pages for its whole length; page 0 is nobody's and fills up the rows."""
    free = 1 + torch.randperm(sum(_num_pages()), generator=torch.Generator().manual_seed(6))
    table = torch.zeros(len(SEQUENCE_LENGTHS), max(_num_pages()), dtype=torch.int64)
    for row, pages in enumerate(free.split(_num_pages())):
        table[row, : len(pages)] = pages
    return table


def _empty_cache(decoder: Decoder) -> Tensor:
    """NaN pages with a gap after each, as where adapters need larger pages than KV does."""
    attention = decoder.layers[0].attention
    shape = (len(decoder.layers), 2, attention.num_kv_heads, PAGE_SIZE, attention.head_dim)
    size = torch.Size(shape).numel()
    like = decoder.norm.weight
    pool = torch.full((1 + sum(_num_pages()), size + 16), torch.nan, dtype=like.dtype, device=like.device)
    return pool[:, :size].view(-1, *shape)


def _step_inputs(
    step: Step,
    ids: list[list[int]],
    done: list[int],
    page_table: Tensor,
    lora: LoRABatch | None,
    device: torch.device,
) -> StepInputs:
    rows, tokens, positions = [], [], []
    for sequence, num_new in step:
        start = done[sequence]
        rows.append((sequence, start, num_new, len(tokens)))
        tokens += ids[sequence][start : start + num_new]
        positions += range(start, start + num_new)
    row_table = torch.tensor(rows)
    slots, starts, num_new_of, _ = row_table.unbind(1)
    kv_lens = starts + num_new_of
    position = torch.tensor(positions)
    pages = page_table[slots.repeat_interleave(num_new_of), position // PAGE_SIZE]
    prefill = [num_new for _, num_new in step if num_new > 1]
    return StepInputs(
        num_prefill_rows=len(prefill),
        num_prefill_tokens=sum(prefill),
        max_kv_len=int(kv_lens.max()),
        token_ids=torch.tensor(tokens, device=device),
        positions=position.to(device),
        kv_slots=(pages * PAGE_SIZE + position % PAGE_SIZE).to(device),
        page_table=page_table.to(device),
        rows=row_table.to(device),
        slots=slots.to(device),
        kv_lens=kv_lens.to(device),
        lora=lora,
    )
