"""Where grammars are compiled and masks are computed: threads of the scheduler's process beside its loop.

A grammar is first compiled by a process of its own (`grammar_checker.py`), which is killed if it takes too long; what it
could compile is compiled again here, in a thread that leaves the interpreter's lock alone meanwhile.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import select
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path

import msgspec

from manylora.runtime.errors import BadGrammarError, ErrorInfo, GrammarTooComplexError, ManyloraError
from manylora.scheduler.grammar import (
    Compiled,
    CompileJob,
    Grammar,
    GrammarAnswer,
    GrammarJob,
    GrammarSource,
    Masked,
    MaskJob,
    without,
)
from manylora.scheduler.grammar_checker import Question, Verdict
from manylora.scheduler.guidance import GuidanceTokenizer

logger = logging.getLogger("manylora.scheduler")

COMPILE_S = 2.0
_START_S = 60.0  # for the checker to load the tokenizer
_MASK_THREADS = min(4, len(os.sched_getaffinity(0)))
_MASKS_AT_ONCE = 8  # one thread takes so many
_STACK_BYTES = 64 << 20  # what the checker could compile in less must not overflow here


class GrammarThreads:
    """`fileno` is readable while answers wait; `started`: some grammar has come. All methods are for the thread that owns
    the scheduler.
    """

    def __init__(self, directory: str | Path, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        """Loads the tokenizer. One that llguidance cannot work with refuses every grammar."""
        self._tokenizer: GuidanceTokenizer | ManyloraError
        try:
            self._tokenizer = GuidanceTokenizer(directory, vocab_size, eos_ids)
        except ManyloraError as error:
            self._tokenizer = error
        self._checker = _Checker(directory, vocab_size, eos_ids)
        self._compiles: queue.SimpleQueue[GrammarSource] = queue.SimpleQueue()
        self._masks: queue.SimpleQueue[list[MaskJob]] = queue.SimpleQueue()
        self._answers: deque[GrammarAnswer] = deque()
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._masks_due = 0
        self.started = False

    def fileno(self) -> int:
        return self._wake

    def submit(self, jobs: Iterable[GrammarJob]) -> None:
        """Have these done."""
        masks: list[MaskJob] = []
        for job in jobs:
            if isinstance(job, CompileJob):
                self._start()
                self._compiles.put(job.source)
            else:
                masks.append(job)
        self._masks_due += len(masks)
        for first in range(0, len(masks), _MASKS_AT_ONCE):
            self._masks.put(masks[first : first + _MASKS_AT_ONCE])

    def take(self, patience: float = 0.0) -> list[GrammarAnswer]:
        """What is done; waits for masks that are due, at most so many seconds."""
        deadline = time.monotonic() + patience
        taken: list[GrammarAnswer] = []
        while True:
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._wake)
            while self._answers:
                answer = self._answers.popleft()
                self._masks_due -= isinstance(answer, Masked)
                taken.append(answer)
            left = deadline - time.monotonic()
            if not self._masks_due or left <= 0:
                return taken
            select.select([self._wake], [], [], left)

    def close(self) -> None:
        self._checker.kill()

    def _start(self) -> None:
        """The threads, when the first grammar comes. They end with the process."""
        if self.started:
            return
        self.started = True
        before = threading.stack_size(_STACK_BYTES)
        threading.Thread(target=self._compile_all, name="grammars", daemon=True).start()
        for _ in range(_MASK_THREADS):
            threading.Thread(target=self._mask_all, name="masks", daemon=True).start()
        threading.stack_size(before)

    def _compile_all(self) -> None:
        while True:
            source = self._compiles.get()
            self._answer([Compiled(source, self._compile(source))])

    def _compile(self, source: GrammarSource) -> Grammar | ErrorInfo:
        try:
            if isinstance(self._tokenizer, ManyloraError):
                raise self._tokenizer
            matcher = self._tokenizer.compile(self._checker.check(source))
            return Grammar(matcher, matcher.mask())
        except ManyloraError as error:
            return error.info()
        except BaseException:  # a panic of the library is no Exception
            logger.exception("a grammar could not be compiled")
            return ManyloraError("Internal error; see the server's log.").info()

    def _mask_all(self) -> None:
        while True:
            self._answer([Masked(job.constraint, _mask(job)) for job in self._masks.get()])

    def _answer(self, answers: list[GrammarAnswer] | list[Compiled] | list[Masked]) -> None:
        self._answers.extend(answers)
        os.eventfd_write(self._wake, 1)


def _mask(job: MaskJob) -> bytes | ErrorInfo:
    try:
        return without(job.constraint.matcher.mask(), job.banned)
    except ManyloraError as error:
        return error.info()
    except BaseException:
        logger.exception("a mask could not be computed")
        return ManyloraError("Internal error; see the server's log.").info()


class _Checker:
    """The client of `grammar_checker.py`, in the thread that compiles; a process that was killed is started again."""

    def __init__(self, directory: str | Path, vocab_size: int, eos_ids: tuple[int, ...]) -> None:
        arguments = [str(directory), str(vocab_size), msgspec.json.encode(eos_ids).decode()]
        self._command = [sys.executable, "-P", "-m", "manylora.scheduler.grammar_checker", *arguments]
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, source: GrammarSource) -> str:
        """The grammar in llguidance's form. Raises BadGrammarError or GrammarTooComplexError."""
        if self._process is None or self._process.poll() is not None:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
            if self._read(self._process, _START_S) is None:
                self.kill()  # or what it says late would be taken for another answer
                raise ManyloraError("The process that checks grammars could not be started.")
        verdict = self._ask(self._process, Question(source.kind, source.text))
        if verdict is None:
            self.kill()
            raise GrammarTooComplexError(
                f"{source.kind} takes more than {COMPILE_S:g} s or too much memory to compile."
            )
        if verdict.error is not None:
            error = verdict.error
            kind = GrammarTooComplexError if error.code == GrammarTooComplexError.code else BadGrammarError
            raise kind(error.message)
        return verdict.grammar

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            with contextlib.suppress(BrokenPipeError):  # a question that it has not read
                self._process.__exit__(None, None, None)

    def _ask(self, process: subprocess.Popen[bytes], question: Question) -> Verdict | None:
        assert process.stdin is not None
        try:
            process.stdin.write(msgspec.json.encode(question) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        return self._read(process, COMPILE_S)

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> Verdict | None:
        """The next answer; None if it does not come in time, or the process ends before."""
        assert process.stdout is not None
        descriptor, line = process.stdout.fileno(), bytearray()
        deadline = time.monotonic() + seconds
        while not line.endswith(b"\n"):
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            left = deadline - time.monotonic()
            if left <= 0 or not poll.poll(1000 * left):
                return None
            if not (part := os.read(descriptor, 1 << 16)):
                return None
            line += part
        return msgspec.json.decode(line, type=Verdict)
