"""A worker that acts on plans with hashes in place of tensors, and objects to every plan that would corrupt memory.

A KV entry remembers the weights, the position, the token and the entry before it; a drawn token is a hash of the chain
of entries its row reads. So a page shared wrongly, reused too early or written by the wrong weights breaks the chain
and fails at once, and whatever slipped through would show as a wrong token. All ranks are one object; only their
acknowledgements are separate.
"""

from __future__ import annotations

import zlib
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from manylora.runtime.errors import ErrorInfo
from manylora.runtime.messages import (
    AdapterCopied,
    AdapterStaged,
    CopyAdapter,
    DropAdapter,
    SchedulerToWorker,
    StageAdapter,
    unpack_i32,
)
from manylora.runtime.plan import (
    FROM_SLOT,
    SLOT_FREQUENCY,
    SLOT_ID,
    SLOT_LAST_TOKEN,
    SLOT_MIN_NEW,
    SLOT_NUM_BIASES,
    SLOT_PROMPT_LEN,
    SLOT_SAMPLE_INDEX,
    SLOT_SEED_HIGH,
    SLOT_SEED_LOW,
    SLOT_TEMPERATURE,
    ForwardBatch,
    ForwardOutput,
    read_section,
)

VOCAB = 40
BASE = "base"
NAN = "nan"  # weights whose digest begins with this draw no finite token


def mix(*parts: object) -> int:
    return zlib.crc32(repr(parts).encode())


def chain(weights: str, tokens: list[int]) -> int:
    """The hash of a KV entry that ends `tokens`, under `weights`."""
    link = 0
    for position, token in enumerate(tokens):
        link = mix(weights, position, token, link)
    return link


def draw(link: int, salt: object, banned: set[int]) -> int:
    """The token drawn after the entry with hash `link`."""
    assert len(banned) < VOCAB, "no token may be drawn"
    token = mix(link, salt) % VOCAB
    while token in banned:
        token = (token + 1) % VOCAB
    return token


def read_masks(plan: ForwardBatch) -> dict[int, set[int]]:
    """Place among the samples -> the tokens that may be drawn there."""
    rows = [row for (row,) in read_section(plan, "masked")]
    words = plan.payload[4 * plan.payload_size :]
    size = 4 * -(-VOCAB // 32)
    assert len(words) == size * len(rows)
    bits = [int.from_bytes(words[i * size : (i + 1) * size], "little") for i in range(len(rows))]
    return {row: {t for t in range(VOCAB) if mask >> t & 1} for row, mask in zip(rows, bits, strict=True)}


def logprob(link: int, token: int) -> float:
    return -(mix("lp", link, token) % 512) / 8


def top_ids(link: int, count: int) -> list[int]:
    return [(link + i) % VOCAB for i in range(count)]


class Entry(NamedTuple):
    """The KV of one token."""

    weights: str
    position: int
    token: int
    before: int
    link: int


@dataclass
class Slot:
    entry: tuple[int, ...]
    stop_ids: set[int] = field(default_factory=set)
    biases: list[tuple[int, int]] = field(default_factory=list)
    history: list[tuple[int, int]] = field(default_factory=list)
    table: dict[int, int] = field(default_factory=dict)
    last_token: int = -1

    @property
    def salt(self) -> object:
        if self.entry[SLOT_TEMPERATURE] == 0:
            return "greedy"
        seed = [self.entry[column] & 0xFFFFFFFF for column in (SLOT_SEED_LOW, SLOT_SEED_HIGH)]
        return (*seed, self.entry[SLOT_SAMPLE_INDEX])


@dataclass
class Row:
    index: int
    slot: Slot
    start: int
    tokens: list[int]
    weights: str
    read: list[Entry]


@dataclass
class Flight:
    """A step whose answer has not been delivered."""

    output: ForwardOutput
    pages: set[int]
    slices: set[int]


class FakeWorker:
    def __init__(
        self, *, num_pages: int, page_size: int, tp_size: int, max_tokens: int, max_adapters: int
    ) -> None:
        self.page_size = page_size
        self.tp_size = tp_size
        self.max_tokens = max_tokens
        self.max_adapters = max_adapters
        self.kv: list[list[Entry | None]] = [[None] * page_size for _ in range(num_pages)]
        self.adapter_pages: dict[int, tuple[int, int]] = {}  # page -> (version, its index there)
        self.slice_table: dict[int, tuple[int, int]] = {}  # row -> (version, its index there)
        self.resident: dict[int, CopyAdapter] = {}  # the last complete copy of each version
        self.digests: dict[int, str] = {}  # of each version ever staged
        self.host_pages: dict[int, int] = {}  # host page -> version
        self.staged: dict[int, StageAdapter] = {}
        self.slots: dict[int, Slot] = {}
        self.flights: deque[Flight] = deque()
        self.stagings: dict[int, set[int]] = {}  # version -> ranks that have not answered
        self.copyings: dict[int, set[int]] = {}
        self.num_steps = 0
        self.max_rows = 0

    def receive(self, message: SchedulerToWorker) -> None:
        match message:
            case ForwardBatch():
                self._run(message)
            case StageAdapter():
                self._stage(message)
            case CopyAdapter():
                self._copy(message)
            case DropAdapter():
                assert message.version not in self.copyings, "dropped while it is copied"
                assert message.version not in self.stagings, "dropped while it is staged"
                for page in unpack_i32(self.staged.pop(message.version).host_pages):
                    del self.host_pages[page]
            case _:
                raise AssertionError(message)

    # ---- adapters -----------------------------------------------------------------------------------------------

    def _stage(self, message: StageAdapter) -> None:
        assert message.version not in self.staged
        for page in unpack_i32(message.host_pages):
            assert page not in self.host_pages, "host page in use"
            self.host_pages[page] = message.version
        self.staged[message.version] = message
        self.digests[message.version] = message.path.split("#")[0]
        self.stagings[message.version] = set(range(self.tp_size))

    def _copy(self, message: CopyAdapter) -> None:
        version = message.version
        assert version in self.staged
        assert version not in self.stagings, "copied before every rank has staged it"
        assert version not in self.copyings
        pages, slices = set(unpack_i32(message.pages)), set(unpack_i32(message.slices))
        for flight in self.flights:
            assert not flight.pages & pages, "a step in flight touches pages of a copy"
            assert not flight.slices & slices, "a step in flight reads slice rows of a copy"
        self.adapter_pages = {
            page: owner for page, owner in self.adapter_pages.items() if owner[0] != version
        }
        for index, page in enumerate(unpack_i32(message.pages)):
            for other in self.copyings:
                assert self.adapter_pages.get(page, (0, 0))[0] != other, "two copies into one page"
            self.adapter_pages[page] = (version, index)
            self.kv[page] = [None] * self.page_size
        for index, row in enumerate(unpack_i32(message.slices)):
            self.slice_table[row] = (version, index)
        self.copyings[version] = set(range(self.tp_size))
        self.resident[version] = message

    def answer_staging(self, version: int, rank: int, error: ErrorInfo | None = None) -> AdapterStaged:
        self.stagings[version].remove(rank)
        if not self.stagings[version]:
            del self.stagings[version]
        return AdapterStaged(rank, version, error)

    def answer_copying(self, version: int, rank: int, error: ErrorInfo | None = None) -> AdapterCopied:
        copied = self.resident[version]
        assert all(self.host_pages[page] == version for page in unpack_i32(self.staged[version].host_pages))
        assert all(self.adapter_pages[page][0] == version for page in unpack_i32(copied.pages))
        self.copyings[version].remove(rank)
        if not self.copyings[version]:
            del self.copyings[version]
        return AdapterCopied(rank, version, error)

    def _weights(self, slices: list[int]) -> str:
        """Which weights a run of slice rows holds."""
        version = self.slice_table[slices[0]][0]
        assert version not in self.copyings, "used before its copy is complete"
        copied = self.resident[version]
        assert list(unpack_i32(copied.slices)) == slices
        assert [self.slice_table[row] for row in slices] == [(version, i) for i in range(len(slices))]
        for index, page in enumerate(unpack_i32(copied.pages)):
            assert self.adapter_pages.get(page) == (version, index), "the adapter's page was overwritten"
        return f"{self.digests[version]}/{version}"

    # ---- steps --------------------------------------------------------------------------------------------------

    def _run(self, plan: ForwardBatch) -> None:
        self.num_steps += 1
        assert plan.step == self.num_steps
        sections = {name: read_section(plan, name) for name in ("rows", "samples", "copies", "prompt_lps")}
        self._take_slots(plan)
        copied = self._copy_pages(sections["copies"])
        rows = self._read_rows(plan, sections["rows"])
        self._check_shape(plan, rows)
        touched = copied | {page for row in rows for page in row.slot.table.values()}
        links = self._write_rows(rows)
        tokens, logprobs, tops, top_lps = self._sample(plan, rows, sections["samples"])
        lps = sections["prompt_lps"]
        prompt_lps = array("f", [logprob(links[index], token) for index, token, _ in lps])
        width = max(0, plan.num_prompt_top)
        prompt_tops = array("i", [i for index, *_ in lps for i in top_ids(links[index], width)])
        prompt_top_lps = array(
            "f", [logprob(links[index], i) for index, *_ in lps for i in top_ids(links[index], width)]
        )
        assert plan.num_prompt_top == max((top for *_, top in lps), default=-1)
        output = ForwardOutput(
            plan.step,
            tokens.tobytes(),
            logprobs.tobytes(),
            tops.tobytes(),
            top_lps.tobytes(),
            prompt_lps.tobytes(),
            prompt_tops.tobytes(),
            prompt_top_lps.tobytes(),
        )
        slices = {row for (row,) in read_section(plan, "slices")}
        self.flights.append(Flight(output, touched, slices))

    def _take_slots(self, plan: ForwardBatch) -> None:
        for entry in read_section(plan, "slots"):
            self.slots[entry[SLOT_ID]] = Slot(entry, last_token=entry[SLOT_LAST_TOKEN])
        for slot, token in read_section(plan, "stop_ids"):
            self.slots[slot].stop_ids.add(token)
        for slot, token, bias in read_section(plan, "biases"):
            self.slots[slot].biases.append((token, bias))
        for slot, token, generated in read_section(plan, "history"):
            self.slots[slot].history.append((token, generated))
        for slot, index, page in read_section(plan, "pages"):
            self.slots[slot].table[index] = page

    def _copy_pages(self, copies: list[tuple[int, ...]]) -> set[int]:
        sources, targets = {source for source, _ in copies}, {target for _, target in copies}
        assert len(targets) == len(copies), "two copies into one page"
        assert not sources & targets, "a page is source and target of copies"
        for source, target in copies:
            self._become_kv(target)
            self.kv[target] = list(self.kv[source])
        return sources | targets

    def _become_kv(self, page: int) -> None:
        """KV may overwrite an adapter that is no longer used, never one being copied."""
        version = self.adapter_pages.pop(page, (0, 0))[0]
        assert version not in self.copyings, "KV written into a page of a copy in flight"

    def _read_rows(self, plan: ForwardBatch, entries: list[tuple[int, ...]]) -> list[Row]:
        tokens = [token for (token,) in read_section(plan, "tokens")]
        weights = self._token_weights(plan)
        rows: list[Row] = []
        expected_offset = 0
        for index, (slot_id, start, count, offset) in enumerate(entries):
            assert offset == expected_offset
            expected_offset += count
            slot = self.slots[slot_id]
            own = tokens[offset : offset + count]
            if own == [FROM_SLOT]:
                assert slot.last_token >= 0, "no token was drawn in this slot"
                own = [slot.last_token]
            assert FROM_SLOT not in own
            assert len(set(weights[offset : offset + count])) == 1, "a row under two adapters"
            rows.append(Row(index, slot, start, own, weights[offset], []))
            self._read_kv(rows[-1])
        assert expected_offset == len(tokens) == plan.num_tokens
        assert len({entry[0] for entry in entries}) == len(entries), "a slot has two rows"
        return rows

    def _read_kv(self, row: Row) -> None:
        before = 0
        for position in range(row.start):
            entry = self.kv[row.slot.table[position // self.page_size]][position % self.page_size]
            assert entry is not None, f"position {position} was never written"
            assert entry.weights == row.weights, "KV of other weights"
            assert (entry.position, entry.before) == (position, before), "KV of another sequence"
            before = entry.link
            row.read.append(entry)

    def _token_weights(self, plan: ForwardBatch) -> list[str]:
        slices = [row for (row,) in read_section(plan, "slices")]
        weights = [BASE] * plan.num_tokens
        segments = read_section(plan, "segments")
        for first, end, first_slice, count in segments:
            assert first < end
            assert weights[first:end] == [BASE] * (end - first)
            weights[first:end] = [self._weights(slices[first_slice : first_slice + count])] * (end - first)
        assert plan.max_slices == max((count for *_, count in segments), default=0)
        assert len(set(weights) - {BASE}) <= self.max_adapters
        for part in (weights[: plan.num_prefill_tokens], weights[plan.num_prefill_tokens :]):
            runs = [w for i, w in enumerate(part) if i == 0 or part[i - 1] != w]
            assert len(runs) == len(set(runs)), "rows are not ordered by adapter"
        return weights

    def _check_shape(self, plan: ForwardBatch, rows: list[Row]) -> None:
        self.max_rows = max(self.max_rows, len(rows))
        assert 0 < plan.num_tokens <= self.max_tokens
        prefill, decode = rows[: plan.num_prefill_rows], rows[plan.num_prefill_rows :]
        assert sum(len(row.tokens) for row in prefill) == plan.num_prefill_tokens
        assert all(len(row.tokens) == 1 for row in decode)
        assert plan.max_kv_len == max(row.start + len(row.tokens) for row in rows)

    def _write_rows(self, rows: list[Row]) -> list[int]:
        """Write every row's KV; the link of each token of the step."""
        read = {
            (row.slot.table[position // self.page_size], position % self.page_size)
            for row in rows
            for position in range(row.start)
        }
        links: list[int] = []
        written: set[tuple[int, int]] = set()
        for row in rows:
            before = row.read[-1].link if row.read else 0
            for position, token in enumerate(row.tokens, row.start):
                page, offset = row.slot.table[position // self.page_size], position % self.page_size
                assert (page, offset) not in read | written, "a row writes what another one uses"
                written.add((page, offset))
                self._become_kv(page)
                link = mix(row.weights, position, token, before)
                self.kv[page][offset] = Entry(row.weights, position, token, before, link)
                before = link
                links.append(link)
        return links

    def _sample(
        self, plan: ForwardBatch, rows: list[Row], samples: list[tuple[int, ...]]
    ) -> tuple[array[int], array[float], array[int], array[float]]:
        tokens, logprobs, tops, top_lps = array("i"), array("f"), array("i"), array("f")
        assert [row for row, _ in samples] == sorted({row for row, _ in samples})
        needs_min_new = needs_biases = False
        masks = read_masks(plan)
        for sample, (index, position) in enumerate(samples):
            row = rows[index]
            slot = row.slot
            assert len(slot.biases) == slot.entry[SLOT_NUM_BIASES]
            needs_biases |= bool(slot.biases)
            assert position == row.start + len(row.tokens)
            link = chain(row.weights, [entry.token for entry in row.read] + row.tokens)
            generated = position - slot.entry[SLOT_PROMPT_LEN]
            below_min = generated < slot.entry[SLOT_MIN_NEW]
            needs_min_new |= below_min
            if slot.entry[SLOT_FREQUENCY]:
                assert plan.penalties
                self._check_history(row, position)
            assert not plan.greedy or slot.salt == "greedy"
            forbidden = slot.stop_ids if below_min else set[int]()
            if sample in masks:
                forbidden = forbidden | (set(range(VOCAB)) - masks[sample])
            token = draw(link, (slot.salt, tuple(slot.biases)), forbidden)
            if row.weights.startswith(NAN):
                token = -1
            slot.last_token = max(token, 0)
            slot.history.append((slot.last_token, 1))
            tokens.append(token)
            if plan.num_top >= 0:
                logprobs.append(logprob(link, token))
                tops.extend(top_ids(link, plan.num_top))
                top_lps.extend(logprob(link, i) for i in top_ids(link, plan.num_top))
        assert plan.min_new == needs_min_new
        assert plan.biases == needs_biases
        return tokens, logprobs, tops, top_lps

    def _check_history(self, row: Row, position: int) -> None:
        prompt_len = row.slot.entry[SLOT_PROMPT_LEN]
        tokens = [entry.token for entry in row.read] + row.tokens
        expected = [(token, int(p >= prompt_len)) for p, token in enumerate(tokens)]
        assert row.slot.history == expected, "penalties count other tokens than the sequence has"
        assert len(tokens) == position
