"""The packed plan: what a builder writes is what a worker's views read."""

import struct
from array import array

from manylora.runtime.plan import (
    SECTIONS,
    SLOT_ID,
    SLOT_LAST_TOKEN,
    SLOT_SEED_HIGH,
    SLOT_SEED_LOW,
    SLOT_TEMPERATURE,
    SLOT_TOP_K,
    SLOT_TOP_P,
    PlanBuilder,
    float_bits,
    read_section,
    section_bounds,
    slot_entry,
)
from manylora.runtime.sampling_params import SamplingParams


def test_sections_round_trip() -> None:
    builder = PlanBuilder()
    builder.add("rows", 3, 0, 5, 0)
    builder.add("rows", 1, 17, 1, 5)
    builder.extend("tokens", [10, 11, 12, 13, 14, -1])
    builder.add("samples", 0, 5)
    builder.add("samples", 1, 18)
    builder.add("segments", 0, 5, 0, 2)
    builder.extend("slices", [7, 9])
    plan = builder.build(4, num_prefill_rows=1, num_prefill_tokens=5, max_kv_len=18, max_slices=2)
    assert (plan.num_rows, plan.num_tokens, plan.count("slices")) == (2, 6, 2)
    assert read_section(plan, "rows") == [(3, 0, 5, 0), (1, 17, 1, 5)]
    assert read_section(plan, "tokens") == [(10,), (11,), (12,), (13,), (14,), (-1,)]
    assert read_section(plan, "segments") == [(0, 5, 0, 2)]
    assert read_section(plan, "slices") == [(7,), (9,)]
    assert read_section(plan, "pages") == []


def test_bounds_cover_the_payload_without_gap() -> None:
    counts = tuple(range(1, len(SECTIONS) + 1))
    end = 0
    for name, width in SECTIONS:
        start, count, found = section_bounds(counts)[name]
        assert (start, found) == (end, width)
        end += count * width
    assert end == sum(count * width for count, (_, width) in zip(counts, SECTIONS, strict=True))


def test_slot_entry_keeps_floats_and_a_64_bit_seed() -> None:
    seed = 0x8123456789ABCDEF & (2**63 - 1) | 0x80000000
    params = SamplingParams(temperature=0.7, top_p=0.9)
    entry = slot_entry(5, params, vocab_size=300, seed=seed, sample_index=2, prompt_len=9)
    assert len(entry) == dict(SECTIONS)["slots"]
    array("i", entry)  # every value fits an int32
    assert entry[SLOT_ID] == 5
    assert (
        struct.unpack("<f", struct.pack("<i", entry[SLOT_TOP_P]))[0]
        == struct.unpack("<f", struct.pack("<f", 0.9))[0]
    )
    assert (entry[SLOT_SEED_HIGH] % 2**32) << 32 | entry[SLOT_SEED_LOW] % 2**32 == seed
    assert entry[SLOT_TOP_K] == 300  # off
    assert entry[SLOT_LAST_TOKEN] == -1


def test_a_greedy_request_has_temperature_zero() -> None:
    for params in (SamplingParams(temperature=0), SamplingParams(temperature=1e-7), SamplingParams(top_k=1)):
        entry = slot_entry(0, params, vocab_size=10, seed=0, sample_index=0, prompt_len=1)
        assert entry[SLOT_TEMPERATURE] == 0
    assert float_bits(1.0) == 0x3F800000
