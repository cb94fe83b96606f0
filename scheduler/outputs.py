"""What a step's answer means: tokens for their sequences, ends, logprobs, and pages that may now be shared."""

from __future__ import annotations

from array import array

from manylora.runtime.errors import ErrorInfo, ManyloraError, NonFiniteLogitsError
from manylora.runtime.messages import (
    Finish,
    LogprobChunk,
    Start,
    StepOutput,
    pack_i32,
    pack_i64,
    unpack_i32,
)
from manylora.runtime.plan import ForwardOutput
from manylora.scheduler.grammar import Constraint, MaskJob
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.roster import Roster
from manylora.scheduler.sequence import Sequence
from manylora.scheduler.sequence_memory import SequenceMemory
from manylora.scheduler.step import StepRecord

WORD = 4  # bytes of an int32 or a float32


def finish_error(handle: int, error: ErrorInfo) -> Finish:
    return Finish(handle, "error", error=error)


class OutputReader:
    def __init__(self, roster: Roster, memory: SequenceMemory, page_size: int, outbox: Outbox) -> None:
        self._roster = roster
        self._outbox = outbox
        self._memory = memory
        self._page_size = page_size

    def read(self, record: StepRecord, output: ForwardOutput) -> StepOutput | None:
        """Apply a step's answer; the message for the front, if there is anything to tell it."""
        answer = _Answer()
        self._complete_chunks(record, answer)
        if record.prompt_lps:
            _add_prompt_logprobs(record, output, answer)
        if record.num_top >= 0:
            _add_logprobs(record, output, answer)
        self._add_tokens(record, unpack_i32(output.tokens), answer)
        return answer.message()

    def _complete_chunks(self, record: StepRecord, answer: _Answer) -> None:
        for sequence, generation, written in record.chunks:
            if sequence.generation != generation:
                continue
            sequence.num_written = written
            self._memory.publish(sequence, written)
            if written >= sequence.prompt_len and sequence.group is not None and not sequence.group.computed:
                sequence.group.computed = True
                self._roster.changed = True
            if written == sequence.max_len:  # max_new_tokens is 0: nothing is drawn
                answer.ended.append((sequence, Finish(sequence.handle, "length")))

    def _add_tokens(self, record: StepRecord, tokens: array[int], answer: _Answer) -> None:
        handles, drawn, page_size = answer.handles, answer.tokens, self._page_size
        for sequence, generation, token in zip(record.samples, record.generations, tokens, strict=True):
            if sequence.generation != generation:
                continue
            if token < 0:
                error = NonFiniteLogitsError("The weights that answer produced logits that are not finite.")
                answer.ended.append((sequence, finish_error(sequence.handle, error.info())))
                continue
            sequence.tokens.append(token)
            handles.append(sequence.handle)
            drawn.append(token)
            length = len(sequence.tokens)
            if not sequence.started:
                answer.start(sequence)
            if token in sequence.stop_ids:
                answer.ended.append((sequence, Finish(sequence.handle, "stop", matched=token)))
            elif sequence.constraint is not None and (end := self._match(sequence, sequence.constraint)):
                answer.ended.append((sequence, end))
            elif length == sequence.max_len:
                answer.ended.append((sequence, Finish(sequence.handle, "length")))
            elif (length - 1) % page_size == 0:
                self._memory.publish(sequence, length - 1)
        for sequence, finish in answer.ended:
            if not sequence.started and finish.error is None:
                answer.start(sequence)
            self._roster.end(sequence, trusted=finish.error is None)

    def _match(self, sequence: Sequence, constraint: Constraint) -> Finish | None:
        """Go on in the sequence's grammar by its last token: its end if that completes the text, else a new mask."""
        token, handle = sequence.tokens[-1], sequence.handle
        try:
            if constraint.matcher.accept(token):
                return Finish(handle, "stop", matched=token if token in constraint.end_ids else None)
        except ManyloraError as error:
            return finish_error(handle, error.info())
        constraint.mask = None
        length = len(sequence.tokens)
        if length < sequence.max_len:
            banned = constraint.banned(length - sequence.prompt_len)
            self._outbox.to_grammars.append(MaskJob(constraint, banned))
        return None


class _Answer:
    """A StepOutput being collected."""

    def __init__(self) -> None:
        self.handles: list[int] = []
        self.tokens: list[int] = []
        self.starts: list[Start] = []
        self.logprobs: list[LogprobChunk] = []
        self.ended: list[tuple[Sequence, Finish]] = []

    def start(self, sequence: Sequence) -> None:
        sequence.started = True
        self.starts.append(
            Start(sequence.handle, sequence.cached_tokens, sequence.version_id, sequence.queue_s)
        )

    def message(self) -> StepOutput | None:
        if not (self.handles or self.ended or self.logprobs):
            return None
        finishes = [finish for _, finish in self.ended]
        return StepOutput(pack_i64(self.handles), pack_i32(self.tokens), self.starts, finishes, self.logprobs)


def _add_prompt_logprobs(record: StepRecord, output: ForwardOutput, answer: _Answer) -> None:
    row = 0
    for sequence, generation, first, count in record.prompt_lps:
        if sequence.generation == generation:
            sequence.lp_sent = first + count
            ids = sequence.tokens[first : first + count].tobytes()
            values = output.prompt_logprobs[row * WORD : (row + count) * WORD]
            top_ids, tops = b"", b""
            if sequence.num_top > 0:
                width = record.num_prompt_top
                columns = [(row + i) * width for i in range(count)]
                top_ids = _rows(output.prompt_top_ids, columns, sequence.num_top)
                tops = _rows(output.prompt_top_logprobs, columns, sequence.num_top)
            answer.logprobs.append(LogprobChunk(sequence.handle, True, ids, values, top_ids, tops))
        row += count


def _add_logprobs(record: StepRecord, output: ForwardOutput, answer: _Answer) -> None:
    for row, sequence in enumerate(record.samples):
        token = output.tokens[row * WORD : (row + 1) * WORD]
        if sequence.num_top < 0 or sequence.generation != record.generations[row] or token == _NON_FINITE:
            continue
        value = output.logprobs[row * WORD : (row + 1) * WORD]
        top_ids, tops = b"", b""
        if sequence.num_top > 0:
            top_ids = _rows(output.top_ids, [row * record.num_top], sequence.num_top)
            tops = _rows(output.top_logprobs, [row * record.num_top], sequence.num_top)
        answer.logprobs.append(LogprobChunk(sequence.handle, False, token, value, top_ids, tops))


def _rows(column: bytes, starts: list[int], count: int) -> bytes:
    """`count` words from each of `starts`: a sequence's own part of wider rows."""
    return b"".join(column[start * WORD : (start + count) * WORD] for start in starts)


_NON_FINITE = pack_i32([-1])
