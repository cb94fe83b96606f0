"""Plays the scheduler for one rank: builds plans, deals out pages at random from a pool full of NaN."""

from __future__ import annotations

import gc
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from manylora.lora.page_layout import pool_geometry
from manylora.runtime.model_config import load_model_config
from manylora.runtime.plan import (
    FROM_SLOT,
    ForwardBatch,
    ForwardOutput,
    PlanBuilder,
    float_bits,
    slot_entry,
)
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.decode_graph import DecodeGraphs
from manylora.tp_worker.distributed import init_tp_group
from manylora.tp_worker.memory_pool import PagePool
from manylora.tp_worker.model_runner import ModelRunner
from manylora.tp_worker.piecewise_graph import PiecewiseGraphs
from manylora.tp_worker.slot_state import SlotState
from manylora.tp_worker.weight_loader import load_model
from tests.tp_worker.resident_adapters import Adapters, make_resident

PAGE_SIZE = 4
NUM_PAGES = 64  # for KV
NUM_ADAPTER_PAGES = 128  # behind those, if there are adapters: the driver deals out none of them
NUM_SLOTS = 6
MAX_PAGES = 16  # of one sequence


def build_runner(
    model_dir: Path,
    device: str = "cpu",
    adapters: Adapters = MappingProxyType({}),
    dtype: torch.dtype = torch.float32,
) -> ModelRunner:
    """A runner over a real model, with every slot dirty, and every page but those of `adapters`."""
    config = load_model_config(model_dir)
    target = torch.device(device)
    group = init_tp_group(0, 1, target, model_dir)
    model = load_model(config, model_dir, "auto", dtype, target, group, seed=0, progress=False)
    geometry = pool_geometry(
        config, tp_size=1, sharding="slora", page_size=PAGE_SIZE, itemsize=dtype.itemsize
    )
    adapter_pages = range(NUM_PAGES, NUM_PAGES + NUM_ADAPTER_PAGES) if adapters else range(0)
    pool = PagePool(geometry, NUM_PAGES + len(adapter_pages), dtype, target)
    pool.elements.fill_(torch.nan)
    if adapters:
        make_resident(adapters, pool, adapter_pages, model, config, group)
    state = SlotState(NUM_SLOTS, MAX_PAGES, config.vocab_size, target)
    state.counts.fill_(3)
    state.in_prompt.fill_(1)
    state.stop_ids.fill_(5)
    return ModelRunner(model, pool, state, vocab_size=config.vocab_size, tp_rank=0)


def make_graphs(runner: ModelRunner) -> tuple[DecodeGraphs, PiecewiseGraphs]:
    """What would be captured of the runner's steps, for adapters too if it has any."""
    model: Any = runner._model
    lora = any(layer.lora is not None for _, _, layer in model.lora_sites())
    graphs = DecodeGraphs(
        runner.model_step,
        model.logits,
        runner._state,
        runner._pool.geometry,
        max_rows=NUM_SLOTS,
        exchanges_planes=False,
        lora=lora,
    )
    pieces = PiecewiseGraphs(
        runner.model_step,
        runner._state,
        runner._pool.geometry,
        max_tokens=MAX_PAGES * PAGE_SIZE,
        dummy_kv_slot=runner.dummy_kv_slot,
        lora=lora,
    )
    return graphs, pieces


def with_graphs(runner: ModelRunner) -> ModelRunner:
    """The runner, which runs its steps by graphs and their pieces from now on."""
    graphs, pieces = make_graphs(runner)
    gc.collect()  # whatever an earlier test pinned: unpinned in the middle of a capture, it would end that
    graphs.capture(show_progress=False)
    pieces.capture(show_progress=False)
    runner.use_graphs(graphs, pieces)
    return runner


class Driver:
    """Collects what the next plan brings; `plan` builds it."""

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._free = list(range(NUM_PAGES))
        random.Random(4).shuffle(self._free)
        self._pages: dict[int, list[int]] = {}
        self._params: dict[int, SamplingParams] = {}
        self._min_new_ends: dict[int, int] = {}  # slot -> position from which stop ids are allowed
        self._builder = PlanBuilder()
        self._step = 0

    def take_slot(
        self,
        slot: int,
        params: SamplingParams,
        known: Sequence[int],
        *,
        prompt_len: int | None = None,
        stop_ids: Sequence[int] = (),
        sample_index: int = 0,
    ) -> None:
        """Give `slot` to a new sequence of which `known` are the tokens so far, the first `prompt_len` its prompt."""
        prompt_len = len(known) if prompt_len is None else prompt_len
        self._free += self._pages.get(slot, [])
        self._pages[slot] = []
        self._params[slot] = params
        self._min_new_ends[slot] = prompt_len + params.min_new_tokens
        entry = slot_entry(
            slot,
            params,
            vocab_size=self._vocab_size,
            seed=params.seed or 0,
            sample_index=sample_index,
            prompt_len=prompt_len,
        )
        self._builder.add("slots", *entry)
        if params.min_new_tokens:
            for token in stop_ids:
                self._builder.add("stop_ids", slot, token)
        for token, bias in (params.logit_bias or {}).items():
            self._builder.add("biases", slot, token, float_bits(bias))
        if params.has_penalties:
            for index, token in enumerate(known):
                self._builder.add("history", slot, token, int(index >= prompt_len))

    def share_prefix(self, source: int, target: int, num_tokens: int) -> None:
        """Let `target` start with `num_tokens` of `source`: full pages are shared, the partly used one is copied."""
        full = num_tokens // PAGE_SIZE
        for index in range(full):
            self._add_page(target, self._pages[source][index])
        if num_tokens % PAGE_SIZE:
            copy = self._free.pop()
            self._builder.add("copies", self._pages[source][full], copy)
            self._add_page(target, copy)

    def plan(
        self,
        rows: Sequence[tuple[int, int, Sequence[int]]],
        *,
        samples: Sequence[int] | None = None,
        num_top: int = -1,
        prompt_lps: Sequence[tuple[int, int, int]] = (),
        adapters: Mapping[int, Sequence[int]] = MappingProxyType({}),
        allowed: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> ForwardBatch:
        """One step of `rows` (slot, start, tokens), prefill rows first; the slots in `samples` (default: all) draw.

        adapters: slot -> the slices of its adapter; allowed: slot -> the only tokens it may draw.
        """
        offset = 0
        sampling: list[int] = []
        min_new = False
        for index, (slot, start, tokens) in enumerate(rows):
            end = start + len(tokens)
            while len(self._pages[slot]) * PAGE_SIZE < end:
                self._add_page(slot, self._free.pop())
            self._builder.add("rows", slot, start, len(tokens), offset)
            self._builder.extend("tokens", tokens)
            if samples is None or slot in samples:
                self._builder.add("samples", index, end)
                if slot in allowed:
                    self._builder.add_mask(len(sampling), mask_of(allowed[slot], self._vocab_size))
                sampling.append(slot)
                min_new |= end < self._min_new_ends[slot]
            if slot in adapters:
                first_slice = self._builder.count("slices")
                slices = adapters[slot]
                self._builder.add("segments", offset, offset + len(tokens), first_slice, len(slices))
                self._builder.extend("slices", slices)
            offset += len(tokens)
        for entry in prompt_lps:
            self._builder.add("prompt_lps", *entry)
        prefill = [tokens for _, _, tokens in rows if len(tokens) > 1]
        self._step += 1
        plan = self._builder.build(
            self._step,
            num_prefill_rows=len(prefill),
            num_prefill_tokens=sum(map(len, prefill)),
            max_kv_len=max(start + len(tokens) for _, start, tokens in rows),
            max_slices=max((len(adapters[slot]) for slot, _, _ in rows if slot in adapters), default=0),
            greedy=all(self._params[slot].greedy for slot in sampling),
            penalties=any(self._params[slot].has_penalties for slot in sampling),
            min_new=min_new,
            num_top=num_top,
            num_prompt_top=max((entry[2] for entry in prompt_lps), default=-1),
            biases=any(bool(self._params[slot].logit_bias) for slot in sampling),
        )
        self._builder = PlanBuilder()
        return plan

    def decode(
        self,
        starts: Mapping[int, int],
        adapters: Mapping[int, Sequence[int]] = MappingProxyType({}),
        allowed: Mapping[int, Sequence[int]] = MappingProxyType({}),
    ) -> ForwardBatch:
        """One token of each slot, after whatever it sampled last."""
        rows = [(slot, start, [FROM_SLOT]) for slot, start in starts.items()]
        return self.plan(rows, adapters=adapters, allowed=allowed)

    def _add_page(self, slot: int, page: int) -> None:
        self._builder.add("pages", slot, len(self._pages[slot]), page)
        self._pages[slot].append(page)


def mask_of(tokens: Sequence[int], vocab_size: int) -> bytes:
    """The mask that allows only these."""
    return sum(1 << token for token in set(tokens)).to_bytes(4 * -(-vocab_size // 32), "little")


def run(runner: ModelRunner, plan: ForwardBatch) -> ForwardOutput:
    """Execute and wait."""
    pending = runner.execute(plan)
    assert pending is not None
    while not pending.ready():
        pass
    return pending.output()
