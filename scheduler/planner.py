"""One step: which running sequences get a row, which waiting ones enter, and the plan that says so.

Every sequence whose prompt is written gets a decode row, its token still on the device if need be; what is left of the
token budget goes to chunks of prompts, those already running first. Only a sequence with a grammar waits for its last token
and for the mask that follows from it: it takes every second step, while the others overlap as ever.
"""

from __future__ import annotations

from itertools import groupby
from operator import attrgetter

from manylora.runtime.plan import FROM_SLOT, ForwardBatch, PlanBuilder, float_bits, slot_entry
from manylora.scheduler.admission import Admission
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import BIASES, LOGPROBS, MIN_NEW, PENALTIES, RANDOM, Phase, Sequence
from manylora.scheduler.sequence_memory import SequenceMemory
from manylora.scheduler.step import StepDraft, StepRecord
from manylora.scheduler.version import Version

_version_id = attrgetter("version_id")
_version = attrgetter("version")


class Planner:
    def __init__(
        self,
        roster: Roster,
        admission: Admission,
        memory: SequenceMemory,
        *,
        token_budget: int,
        vocab_size: int,
    ) -> None:
        self._roster = roster
        self._admission = admission
        self._memory = memory
        self._token_budget = token_budget
        self._vocab_size = vocab_size

    def plan(self, step: int) -> tuple[ForwardBatch, StepRecord] | None:
        """The next step, or None if no row can be planned now."""
        draft = StepDraft(self._token_budget)
        self._continue_running(draft)
        self._admission.admit(draft, step)
        if not draft.decode and not draft.prefill:
            return None
        planned = _Assembly(draft, self._vocab_size).build(step, self._memory.take_moved())
        for tail in draft.tails:
            self._memory.unlock_tail(tail)
        return planned

    def _continue_running(self, draft: StepDraft) -> None:
        """Rows for what runs already; the oldest first, since a preemption takes from the end."""
        running, decode = self._roster.running, draft.decode
        prefilling: list[Sequence] = []
        index = 0
        while index < len(running):
            sequence = running[index]
            planned = sequence.num_planned
            if planned < sequence.prefill_end:
                prefilling.append(sequence)
            elif planned < sequence.max_len - 1 and (sequence.constraint is None or _may_go_on(sequence)):
                if planned < sequence.capacity or self._grow(sequence, draft):
                    decode.append(sequence)
                elif sequence.phase is Phase.WAITING:
                    break  # it was the youngest, and has given up its own pages
            index += 1
        draft.budget -= len(decode)
        for sequence in prefilling:
            if draft.budget <= 0:
                break
            draft.add_chunk(sequence)

    def _grow(self, sequence: Sequence, draft: StepDraft) -> bool:
        """One more page, taken from the youngest if need be. False: it was preempted itself, or has to wait for a
        copy in flight to end.
        """
        running = self._roster.running
        while (page := self._memory.grow(sequence)) is None:
            youngest = running[-1]
            if youngest is sequence and len(running) == 1:
                return False
            self._roster.preempt(youngest)
            if youngest is sequence:
                return False
        draft.pages += (sequence.slot, len(sequence.pages) - 1, page)
        return True


class _Assembly:
    """Writes a draft into a plan and moves its sequences on."""

    def __init__(self, draft: StepDraft, vocab_size: int) -> None:
        self._draft = draft
        self._vocab_size = vocab_size
        self._builder = PlanBuilder()
        self._rows: list[int] = []
        self._tokens: list[int] = []
        self._positions: list[int] = []  # flat `samples`
        self._samples: list[Sequence] = []
        self._chunks: list[tuple[Sequence, int, int]] = []
        self._prompt_lps: list[tuple[Sequence, int, int, int]] = []
        self._num_prompt_top = -1
        self._max_kv = 0
        self._max_slices = 0

    def build(self, step: int, moved: list[tuple[int, int, int]]) -> tuple[ForwardBatch, StepRecord]:
        draft, builder = self._draft, self._builder
        for sequence in draft.entered:
            self._take_slot(sequence)
        draft.prefill.sort(key=lambda chunk: chunk[0].version_id)
        draft.decode.sort(key=_version_id)
        for version, chunks in groupby(draft.prefill, key=lambda chunk: chunk[0].version):
            first = len(self._tokens)
            for sequence, count in chunks:
                self._add_chunk(sequence, count)
            self._add_segment(version, first)
        num_prefill_tokens = len(self._tokens)
        for version, run in groupby(draft.decode, key=_version):
            first = len(self._tokens)
            self._add_decode_rows(list(run))
            self._add_segment(version, first)
        for entry in moved:
            draft.pages += entry
        builder.extend("rows", self._rows)
        builder.extend("tokens", self._tokens)
        builder.extend("samples", self._positions)
        builder.extend("pages", draft.pages)
        builder.extend("copies", draft.copies)
        self._add_masks()
        traits, num_top, min_new = self._sampling_needs()
        plan = builder.build(
            step,
            num_prefill_rows=len(draft.prefill),
            num_prefill_tokens=num_prefill_tokens,
            max_kv_len=self._max_kv,
            max_slices=self._max_slices,
            greedy=not traits & RANDOM,
            penalties=bool(traits & PENALTIES),
            min_new=min_new,
            num_top=num_top,
            num_prompt_top=self._num_prompt_top,
            biases=bool(traits & BIASES),
        )
        generations = [sequence.generation for sequence in self._samples]
        record = StepRecord(
            step, self._samples, generations, self._chunks, self._prompt_lps, num_top, self._num_prompt_top
        )
        return plan, record

    def _take_slot(self, sequence: Sequence) -> None:
        params, slot = sequence.params, sequence.slot
        self._builder.extend(
            "slots",
            slot_entry(
                slot,
                params,
                vocab_size=self._vocab_size,
                seed=sequence.seed,
                sample_index=sequence.sample_index,
                prompt_len=sequence.prompt_len,
            ),
        )
        if sequence.traits & MIN_NEW:
            for token in sorted(sequence.stop_ids):
                self._builder.add("stop_ids", slot, token)
        for token, bias in (params.logit_bias or {}).items():
            self._builder.add("biases", slot, token, float_bits(bias))
        if sequence.traits & PENALTIES:
            for position, token in enumerate(sequence.tokens):
                self._builder.add("history", slot, token, int(position >= sequence.prompt_len))

    def _add_chunk(self, sequence: Sequence, count: int) -> None:
        offset, start = len(self._tokens), sequence.num_planned
        end = start + count
        self._rows += (sequence.slot, start, count, offset)
        self._tokens += sequence.tokens[start:end]
        self._add_prompt_lps(sequence, offset - start, end)
        if end == sequence.prefill_end < sequence.max_len:
            self._positions += (len(self._rows) // 4 - 1, end)
            self._samples.append(sequence)
        self._chunks.append((sequence, sequence.generation, end))
        sequence.num_planned = end
        self._max_kv = max(self._max_kv, end)

    def _add_prompt_lps(self, sequence: Sequence, shift: int, end: int) -> None:
        """The wanted logprobs that a chunk up to `end` yields: token t's at the token before it."""
        first, last = sequence.lp_next, min(end + 1, sequence.prompt_len)
        if first >= last:
            return
        top = sequence.num_top
        for target in range(first, last):
            self._builder.add("prompt_lps", target - 1 + shift, sequence.tokens[target], top)
        self._prompt_lps.append((sequence, sequence.generation, first, last - first))
        self._num_prompt_top = max(self._num_prompt_top, top)
        sequence.lp_next = last

    def _add_decode_rows(self, sequences: list[Sequence]) -> None:
        rows, positions = self._rows, self._positions
        row, offset = len(rows) // 4, len(self._tokens)
        longest = self._max_kv
        for sequence in sequences:
            start = sequence.num_planned
            sequence.num_planned = end = start + 1
            rows += (sequence.slot, start, 1, offset)
            positions += (row, end)
            if end > longest:
                longest = end
            row += 1
            offset += 1
        self._tokens += [FROM_SLOT] * len(sequences)
        self._samples += sequences
        self._max_kv = longest

    def _add_segment(self, version: Version | None, first: int) -> None:
        """The tokens from `first` to the last one use `version`."""
        if version is None:
            return
        builder = self._builder
        builder.add("segments", first, len(self._tokens), builder.count("slices"), version.num_slices)
        builder.extend("slices", version.slices)
        self._max_slices = max(self._max_slices, version.num_slices)

    def _add_masks(self) -> None:
        for index, sequence in enumerate(self._samples):
            if (constraint := sequence.constraint) is not None:
                assert constraint.mask is not None
                self._builder.add_mask(index, constraint.mask)

    def _sampling_needs(self) -> tuple[int, int, bool]:
        """Of the rows that draw a token: their traits together, the most top logprobs, whether min_new_tokens holds."""
        traits = 0
        for sequence in self._samples:
            traits |= sequence.traits
        num_top, min_new = -1, False
        if traits & LOGPROBS:
            num_top = max(sequence.num_top for sequence in self._samples)
        if traits & MIN_NEW:
            min_new = any(
                sequence.num_planned - sequence.prompt_len < sequence.params.min_new_tokens
                for sequence in self._samples
            )
        return traits, num_top, min_new


def _may_go_on(sequence: Sequence) -> bool:
    """Whether a sequence with a grammar knows its last token, and what may follow it."""
    return sequence.may_draw and len(sequence.tokens) > sequence.num_planned
