"""Slots: what a plan's sections leave in the tables."""

from __future__ import annotations

import torch

from manylora.runtime.bounds import MAX_STOP_TOKEN_IDS
from manylora.runtime.plan import float_bits, slot_entry
from manylora.runtime.sampling_params import SamplingParams
from manylora.tp_worker.slot_state import SlotState

VOCAB = 12
WIDTHS = {"slots": 16, "stop_ids": 2, "biases": 3, "history": 3, "pages": 3}


def state() -> SlotState:
    return SlotState(4, 5, VOCAB, torch.device("cpu"))


def sections(**entries: list[list[int]]) -> dict[str, torch.Tensor]:
    return {
        name: torch.tensor(entries.get(name, []), dtype=torch.int64).view(-1, width)
        for name, width in WIDTHS.items()
    }


def entry(slot: int, params: SamplingParams, last_token: int = -1) -> list[int]:
    return slot_entry(
        slot,
        params,
        vocab_size=VOCAB,
        seed=(7 << 32) + 2**31 + 1,
        sample_index=3,
        prompt_len=9,
        last_token=last_token,
    )


def test_parameters_survive_the_trip() -> None:
    slots = state()
    params = SamplingParams(
        temperature=0.7,
        top_p=0.9,
        top_k=5,
        min_p=0.1,
        frequency_penalty=-1.5,
        presence_penalty=0.25,
        repetition_penalty=1.1,
        min_new_tokens=4,
    )
    slots.apply(sections(slots=[entry(2, params, last_token=6), entry(0, SamplingParams())]))
    columns = slots.sampling(torch.tensor([0, 2]))
    assert columns.temperature.tolist() == torch.tensor([1.0, 0.7]).tolist()
    assert columns.top_p.tolist() == torch.tensor([1.0, 0.9]).tolist()
    assert columns.min_p.tolist() == torch.tensor([0.0, 0.1]).tolist()
    assert columns.frequency.tolist() == [0.0, -1.5]
    assert columns.presence.tolist() == [0.0, 0.25]
    assert columns.repetition.tolist() == torch.tensor([1.0, 1.1]).tolist()
    assert columns.top_k.tolist() == [VOCAB, 5]
    assert (columns.seed_low & 0xFFFFFFFF).tolist() == [2**31 + 1] * 2
    assert columns.seed_high.tolist() == [7, 7]
    assert columns.sample_index.tolist() == [3, 3]
    assert columns.prompt_len.tolist() == [9, 9]
    assert columns.min_new.tolist() == [0, 4]
    assert slots.last_tokens(torch.tensor([2, 0])).tolist() == [6, -1]


def test_greedy_is_temperature_zero() -> None:
    slots = state()
    slots.apply(sections(slots=[entry(1, SamplingParams(temperature=0.9, top_k=1))]))
    assert slots.sampling(torch.tensor([1])).temperature.tolist() == [0.0]
    assert float_bits(0.0) == 0


def test_stop_ids_replace_those_of_the_slots_last_user() -> None:
    slots = state()
    first = [[1, token] for token in range(MAX_STOP_TOKEN_IDS)]
    slots.apply(sections(slots=[entry(1, SamplingParams()), entry(3, SamplingParams())], stop_ids=first))
    assert slots.stop_ids[1].tolist() == list(range(MAX_STOP_TOKEN_IDS))
    second = [[3, 8], [3, 2], [1, 7]]
    slots.apply(sections(slots=[entry(3, SamplingParams()), entry(1, SamplingParams())], stop_ids=second))
    assert slots.stop_ids[1, :2].tolist() == [7, -1]
    assert slots.stop_ids[3, :3].tolist() == [8, 2, -1]
    assert (slots.stop_ids[[0, 2]] == -1).all()


def test_history_counts_what_was_generated_and_marks_the_prompt() -> None:
    slots = state()
    slots.counts.fill_(9)
    slots.in_prompt.fill_(1)
    prompt, generated = [4] * 300 + [5], [5, 7, 7]
    history = [[2, token, 0] for token in prompt] + [[2, token, 1] for token in generated]
    slots.apply(sections(slots=[entry(2, SamplingParams(presence_penalty=1))], history=history))
    assert slots.in_prompt[2].nonzero().flatten().tolist() == [4, 5]
    assert slots.counts[2].tolist() == [0, 0, 0, 0, 0, 1, 0, 2, 0, 0, 0, 0]
    assert (slots.counts[[0, 1, 3]] == 9).all()


def test_recording_remembers_the_last_token_and_counts_if_asked() -> None:
    slots = state()
    rows = torch.tensor([3, 1])
    slots.record(rows, torch.tensor([10, 2]), count=False)
    slots.record(rows, torch.tensor([11, 2]), count=True)
    assert slots.last_tokens(torch.tensor([1, 3])).tolist() == [2, 11]
    assert slots.counts.nonzero().tolist() == [[1, 2], [3, 11]]


def test_pages_fill_the_page_table() -> None:
    slots = state()
    slots.apply(sections(pages=[[0, 0, 17], [3, 0, 4], [0, 1, 2]]))
    slots.apply(sections(pages=[[3, 1, 9]]))
    assert slots.page_table[0, :2].tolist() == [17, 2]
    assert slots.page_table[3, :2].tolist() == [4, 9]


def test_biases_are_those_of_the_last_sequence() -> None:
    slots = state()
    first = SamplingParams(logit_bias={3: 1.5, 4: -2.0, 11: 100.0})
    bits = [[2, token, float_bits(bias)] for token, bias in (first.logit_bias or {}).items()]
    others = [[0, 7, float_bits(0.25)]]
    entries = [entry(2, first), entry(0, SamplingParams(logit_bias={7: 0.25}))]
    slots.apply(sections(slots=entries, biases=bits + others))
    columns = slots.sampling(torch.tensor([2, 0, 1]))
    assert columns.num_biases.tolist() == [3, 1, 0]
    assert slots.bias_ids[2, :3].tolist() == [3, 4, 11]
    assert slots.biases[2, :3].tolist() == [1.5, -2.0, 100.0]
    assert (slots.bias_ids[0, 0].item(), slots.biases[0, 0].item()) == (7, 0.25)
    slots.apply(sections(slots=[entry(2, SamplingParams())]))
    assert slots.sampling(torch.tensor([2])).num_biases.tolist() == [0]
