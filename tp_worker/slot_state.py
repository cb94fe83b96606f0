"""What a worker remembers of each running sequence between steps, as device tensors with one row per slot.

The scheduler names slots and fills them through the plan; sampled tokens are written here inside the step, so that the
next plan, already queued, needs none of their values.
"""

from __future__ import annotations

import torch

from manylora.kernels.greedy import draw_greedy
from manylora.kernels.greedy_work import GreedyWork
from manylora.runtime.bounds import MAX_LOGIT_BIASES, MAX_STOP_TOKEN_IDS
from manylora.runtime.plan import (
    SLOT_FREQUENCY,
    SLOT_ID,
    SLOT_LAST_TOKEN,
    SLOT_MIN_NEW,
    SLOT_MIN_P,
    SLOT_NUM_BIASES,
    SLOT_PRESENCE,
    SLOT_PROMPT_LEN,
    SLOT_REPETITION,
    SLOT_SAMPLE_INDEX,
    SLOT_SEED_HIGH,
    SLOT_SEED_LOW,
    SLOT_TEMPERATURE,
    SLOT_TOP_K,
    SLOT_TOP_P,
)

_ENTRY_WIDTH = 16


class SlotState:
    """Rows for `num_slots` sequences of at most `max_pages` pages each, and a dummy one for rows that only fill a graph.

    page_table: (num_slots, max_pages) int64; entries a sequence has not reached hold some valid page.
    stop_ids: (num_slots, MAX_STOP_TOKEN_IDS) int64, -1 for none.
    bias_ids: (num_slots, MAX_LOGIT_BIASES) int64 and biases: the same in float32; the first SLOT_NUM_BIASES of a row count,
        the others are leftovers of earlier sequences.
    counts: (num_slots, vocab) int32, how often each token was generated; in_prompt: (num_slots, vocab) uint8, 1 or 0. Both
        are kept only for sequences with penalties, and hold leftovers in every other row.
    """

    def __init__(self, num_slots: int, max_pages: int, vocab_size: int, device: torch.device) -> None:
        self.dummy_slot = num_slots
        num_slots += 1
        self.page_table = torch.zeros(num_slots, max_pages, dtype=torch.int64, device=device)
        self.stop_ids = torch.full((num_slots, MAX_STOP_TOKEN_IDS), -1, dtype=torch.int64, device=device)
        self.bias_ids = torch.zeros(num_slots, MAX_LOGIT_BIASES, dtype=torch.int64, device=device)
        self.biases = torch.zeros(num_slots, MAX_LOGIT_BIASES, dtype=torch.float32, device=device)
        self.counts = torch.zeros(num_slots, vocab_size, dtype=torch.int32, device=device)
        self.in_prompt = torch.zeros(num_slots, vocab_size, dtype=torch.uint8, device=device)
        self._entries = torch.zeros(num_slots, _ENTRY_WIDTH, dtype=torch.int32, device=device)
        self.last_token = self._entries[:, SLOT_LAST_TOKEN]
        self._greedy_work = GreedyWork(num_slots, vocab_size, device)

    def apply(self, sections: dict[str, torch.Tensor]) -> None:
        """Take in the plan's `slots`, `stop_ids`, `biases`, `history` and `pages`, each (count, width) int64."""
        slots, history, pages = sections["slots"], sections["history"], sections["pages"]
        if len(slots):
            ids = slots[:, SLOT_ID]
            self._entries.index_copy_(0, ids, slots.int())
            self.stop_ids.index_fill_(0, ids, -1)
            if len(history):
                self.counts.index_fill_(0, ids, 0)
                self.in_prompt.index_fill_(0, ids, 0)
        if len(sections["stop_ids"]):
            slot, token = sections["stop_ids"].unbind(1)
            self.stop_ids[slot, _place_in_run(slot)] = token
        if len(sections["biases"]):
            slot, token, bias = sections["biases"].unbind(1)
            place = _place_in_run(slot)
            self.bias_ids[slot, place] = token
            self.biases[slot, place] = bias.int().view(torch.float32)
        if len(history):
            self._apply_history(history)
        if len(pages):
            self.page_table[pages[:, 0], pages[:, 1]] = pages[:, 2]

    def record(self, slots: torch.Tensor, tokens: torch.Tensor, count: bool) -> None:
        """Remember the tokens just sampled, each >= 0; `count` them if somebody has penalties. Slots are distinct."""
        self.last_token.index_copy_(0, slots, tokens.int())
        if count:
            self.counts[slots, tokens] += 1

    def draw_greedy(self, slots: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Draw each row's best token and remember it, without counting.

        slots: (n,) int64, n at most the number of slots; logits: (n, vocab) of any floating dtype. Returns (n,) int32:
        the tokens, -1 where the row is not finite; such a row's slot remembers some valid id.
        """
        return draw_greedy(logits, slots, self.last_token, self._greedy_work)

    def last_tokens(self, slots: torch.Tensor) -> torch.Tensor:
        """(n,) -> (n,) int64."""
        return self.last_token[slots].long()

    def sampling(self, slots: torch.Tensor) -> SamplingColumns:
        """The sampling parameters of these slots."""
        return SamplingColumns(self._entries[slots])

    def _apply_history(self, history: torch.Tensor) -> None:
        slot, token, generated = history.unbind(1)
        place = slot * self.counts.shape[1] + token
        self.counts.view(-1).scatter_add_(0, place, generated.int())
        # amax, because the same token may be in prompt and answer.
        self.in_prompt.view(-1).scatter_reduce_(0, place, (1 - generated).to(torch.uint8), "amax")


def _place_in_run(slots: torch.Tensor) -> torch.Tensor:
    """(n,) -> (n,) int64: how many entries before it have the same slot, whose entries lie next to each other."""
    place = torch.arange(len(slots), device=slots.device)
    starts_run = torch.ones_like(slots, dtype=torch.bool)
    starts_run[1:] = slots[1:] != slots[:-1]
    return place - torch.where(starts_run, place, 0).cummax(0).values


class SamplingColumns:
    """The sampling parameters of some slots, one column each; floats as float32, integers as int64."""

    def __init__(self, entries: torch.Tensor) -> None:
        """entries: (n, 16) int32, as in the plan's `slots`."""
        floats, integers = entries.view(torch.float32), entries.long()
        self.temperature = floats[:, SLOT_TEMPERATURE]
        self.top_p = floats[:, SLOT_TOP_P]
        self.min_p = floats[:, SLOT_MIN_P]
        self.frequency = floats[:, SLOT_FREQUENCY]
        self.presence = floats[:, SLOT_PRESENCE]
        self.repetition = floats[:, SLOT_REPETITION]
        self.top_k = integers[:, SLOT_TOP_K]
        self.seed_low = integers[:, SLOT_SEED_LOW]
        self.seed_high = integers[:, SLOT_SEED_HIGH]
        self.sample_index = integers[:, SLOT_SAMPLE_INDEX]
        self.prompt_len = integers[:, SLOT_PROMPT_LEN]
        self.min_new = integers[:, SLOT_MIN_NEW]
        self.num_biases = integers[:, SLOT_NUM_BIASES]
