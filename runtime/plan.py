"""The plan of one step: a handful of integers and one packed int32 payload.

The scheduler writes it with `PlanBuilder`, every worker copies the payload to its device in one transfer and takes
views of it (`section_bounds`). No struct per request crosses the wire, and everything a worker needs to know on the
host (sizes, which features are in use) is a plain integer of the message, so its step never synchronises.

A *row* is one sequence of this step. Rows are ordered: prefill rows first, then decode rows (exactly one token each);
within each part by adapter, so that LoRA segments are contiguous runs of tokens. Tokens lie row after row.

Sections of the payload, in this order, each (count, width) int32:

    rows       num_rows      4   slot, start (tokens whose KV is already there), num_new tokens, token_offset
    tokens     num_tokens    1   token id, or -1: the last token sampled in the row's slot
    samples    num_samples   2   row, position of the token to be drawn (= start + num_new); rising by row
    slots      num_slots    16   a slot taken by a new sequence, before anything else of the step; see SLOT_*
    stop_ids   num_stop_ids  2   slot, token id that may not be drawn before min_new_tokens
    biases     num_biases    3   slot, token id, what is added to its logit (float bits): a new slot's, in a run
    history    num_history   3   slot, token id, 1 if generated else 0: what penalties must know of a new slot
    pages      num_pages     3   slot, index in the slot's page table, page
    copies     num_copies    2   source page, target page: whole-page copies, before the step writes anything
    segments   num_segments  4   first token, end token, first entry in `slices`, number of slices
    slices     num_slices    1   slice ids (rows of the worker's slice table)
    prompt_lps num_prompt_lps 3  token index, id of the token that followed it in the prompt, its number of top logprobs
    masked     num_masked    1   place in `samples` of a row whose token a mask limits; rising

Behind the sections lie the masks of the `masked` rows, ⌈vocabulary / 32⌉ int32 each: bit i of word w is set if token
32 · w + i may be drawn.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterable, Sequence

import msgspec

from manylora.runtime.sampling_params import SamplingParams

SECTIONS: tuple[tuple[str, int], ...] = (
    ("rows", 4),
    ("tokens", 1),
    ("samples", 2),
    ("slots", 16),
    ("stop_ids", 2),
    ("biases", 3),
    ("history", 3),
    ("pages", 3),
    ("copies", 2),
    ("segments", 4),
    ("slices", 1),
    ("prompt_lps", 3),
    ("masked", 1),
)
# Columns of `slots`. Floats are stored as their bits.
(
    SLOT_ID,
    SLOT_TEMPERATURE,  # float bits; 0 means greedy
    SLOT_TOP_P,  # float bits
    SLOT_TOP_K,  # vocabulary size when off
    SLOT_MIN_P,  # float bits
    SLOT_FREQUENCY,  # float bits
    SLOT_PRESENCE,  # float bits
    SLOT_REPETITION,  # float bits
    SLOT_SEED_LOW,
    SLOT_SEED_HIGH,
    SLOT_SAMPLE_INDEX,  # which of the request's n samples
    SLOT_PROMPT_LEN,
    SLOT_MIN_NEW,  # stop_ids may not be drawn before this many new tokens
    SLOT_LAST_TOKEN,  # what "the last token sampled" is until the slot has sampled; -1 if none
    SLOT_NUM_BIASES,
) = range(15)
FROM_SLOT = -1  # in `tokens`


class ForwardBatch(msgspec.Struct, frozen=True, tag=True):
    """One step. `counts` are the sections' row counts in SECTIONS order; `payload` the packed int32 sections."""

    step: int
    num_prefill_rows: int
    num_prefill_tokens: int
    max_kv_len: int  # longest row after this step
    max_slices: int  # most slices any segment has; 0: no LoRA in this step
    greedy: bool  # every sampling row is greedy
    penalties: bool  # some sampling row has a penalty
    min_new: bool  # some sampling row is still below min_new_tokens
    num_top: int  # -1: nobody wants logprobs; else the most top logprobs wanted by a sampling row
    num_prompt_top: int  # the same of `prompt_lps`
    counts: tuple[int, ...]
    payload: bytes
    biases: bool = False  # some sampling row has logit biases

    def count(self, section: str) -> int:
        return self.counts[_INDEX[section]]

    @property
    def num_rows(self) -> int:
        return self.counts[0]

    @property
    def num_tokens(self) -> int:
        return self.counts[1]

    @property
    def payload_size(self) -> int:
        """Of the sections, without the masks, in int32."""
        return sum(count * width for count, (_, width) in zip(self.counts, SECTIONS, strict=True))


class ForwardOutput(msgspec.Struct, frozen=True, tag=True):
    """What rank 0 answers to a ForwardBatch. Columns align with the plan's `samples` and `prompt_lps`.

    A token of -1 says the row's logits were not finite. The logprob columns are empty unless asked for; top columns are
    (count, num_top) and (count, num_prompt_top). Logprobs are the model's own: before penalties and temperature.
    """

    step: int
    tokens: bytes  # int32
    logprobs: bytes = b""  # float32, of each drawn token
    top_ids: bytes = b""  # int32
    top_logprobs: bytes = b""  # float32
    prompt_logprobs: bytes = b""  # float32
    prompt_top_ids: bytes = b""  # int32
    prompt_top_logprobs: bytes = b""  # float32


_INDEX = {name: index for index, (name, _) in enumerate(SECTIONS)}


def section_bounds(counts: Sequence[int]) -> dict[str, tuple[int, int, int]]:
    """Section -> (first int32, count, width) of the payload."""
    bounds: dict[str, tuple[int, int, int]] = {}
    start = 0
    for (name, width), count in zip(SECTIONS, counts, strict=True):
        bounds[name] = (start, count, width)
        start += count * width
    return bounds


def read_section(plan: ForwardBatch, section: str) -> list[tuple[int, ...]]:
    """One section as tuples: for tests and tools, not for a worker's step."""
    start, count, width = section_bounds(plan.counts)[section]
    values = array("i", plan.payload[4 * start : 4 * (start + count * width)])
    return [tuple(values[i * width : (i + 1) * width]) for i in range(count)]


class PlanBuilder:
    """Collects a step's sections; `build` packs them. One builder a step."""

    def __init__(self) -> None:
        self._arrays = {name: array("i") for name, _ in SECTIONS}
        self._masks: list[bytes] = []

    def add(self, section: str, *values: int) -> None:
        """Append one entry (`values` must be the section's width)."""
        self._arrays[section].extend(values)

    def extend(self, section: str, values: Iterable[int]) -> None:
        """Append many entries' flat values."""
        self._arrays[section].extend(values)

    def add_mask(self, sample: int, mask: bytes) -> None:
        """Limit the token of a sample; `mask` as int32 words."""
        self.add("masked", sample)
        self._masks.append(mask)

    def count(self, section: str) -> int:
        return len(self._arrays[section]) // SECTIONS[_INDEX[section]][1]

    def build(
        self,
        step: int,
        *,
        num_prefill_rows: int,
        num_prefill_tokens: int,
        max_kv_len: int,
        max_slices: int = 0,
        greedy: bool = True,
        penalties: bool = False,
        min_new: bool = False,
        num_top: int = -1,
        num_prompt_top: int = -1,
        biases: bool = False,
    ) -> ForwardBatch:
        return ForwardBatch(
            step,
            num_prefill_rows,
            num_prefill_tokens,
            max_kv_len,
            max_slices,
            greedy,
            penalties,
            min_new,
            num_top,
            num_prompt_top,
            tuple(self.count(name) for name, _ in SECTIONS),
            b"".join([*(self._arrays[name].tobytes() for name, _ in SECTIONS), *self._masks]),
            biases,
        )


def slot_entry(
    slot: int,
    params: SamplingParams,
    *,
    vocab_size: int,
    seed: int,
    sample_index: int,
    prompt_len: int,
    last_token: int = -1,
) -> list[int]:
    """The 16 integers of one `slots` entry."""
    return [
        slot,
        float_bits(0.0 if params.greedy else params.temperature),
        float_bits(params.top_p),
        vocab_size if params.top_k == -1 else min(params.top_k, vocab_size),
        float_bits(params.min_p),
        float_bits(params.frequency_penalty),
        float_bits(params.presence_penalty),
        float_bits(params.repetition_penalty),
        _signed(seed & 0xFFFFFFFF),
        _signed(seed >> 32 & 0xFFFFFFFF),
        sample_index,
        prompt_len,
        params.min_new_tokens,
        last_token,
        len(params.logit_bias or ()),
        0,
    ]


def float_bits(value: float) -> int:
    """The int32 whose bits are `value` as float32."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
