"""One sequence in the front: what arrived for it, its text, and how it ended.

The scheduler ends a sequence by token (eos, stop ids, length); a stop string or an abort ends it here. Whatever ended
it, text, ids and logprobs are cut at the same place.
"""

from __future__ import annotations

import time
from collections.abc import Sequence as Items

import msgspec

from manylora.runtime.errors import ManyloraError, error_from
from manylora.runtime.messages import Finish, LogprobChunk, Start
from manylora.runtime.sampling_params import SamplingParams
from manylora.tokenizer_manager.answer import Aborted, Answer, Length, MetaInfo, Stop
from manylora.tokenizer_manager.generate_call import Prompt
from manylora.tokenizer_manager.incremental_decoder import IncrementalDecoder
from manylora.tokenizer_manager.logprob_columns import LogprobColumns
from manylora.tokenizer_manager.stop_checker import StopChecker, StopMatch
from manylora.tokenizer_manager.tokenizer import Tokenizer


class Sequence:
    """State of one sample of one prompt, under the scheduler's `handle`.

    finish: set once, when the sequence has ended well or was aborted. error: set instead when it failed.
    """

    __slots__ = (
        "_cached_tokens",
        "_decoder",
        "_index",
        "_lora_version",
        "_num_decoded",
        "_num_logprobs_told",
        "_output_logprobs",
        "_params",
        "_parts",
        "_prompt",
        "_prompt_ids",
        "_prompt_logprobs",
        "_stop_checker",
        "_text_length",
        "_tokenizer",
        "eager",
        "error",
        "finish",
        "handle",
        "output_ids",
        "rid",
        "started_at",
        "token_at",
    )

    def __init__(
        self,
        handle: int,
        rid: str,
        prompt: Prompt,
        params: SamplingParams,
        prompt_ids: Items[int],
        tokenizer: Tokenizer,
        *,
        started_at: float,
        stream: bool,
        index: int | None,
    ) -> None:
        """`params`: the prompt's, settled. `started_at`: `time.monotonic()` when the call arrived."""
        self.handle, self.rid = handle, rid
        self.output_ids: list[int] = []
        self.finish: Length | Stop | Aborted | None = None
        self.error: ManyloraError | None = None
        self._prompt, self._params, self._prompt_ids = prompt, params, prompt_ids
        self._tokenizer, self.started_at, self._index = tokenizer, started_at, index
        self.token_at = 0.0  # when its last token came, `time.monotonic()`; 0: none has
        self._cached_tokens = self._lora_version = 0
        pieces = tokenizer.visible_pieces if params.skip_special_tokens else tokenizer.pieces
        self._decoder = IncrementalDecoder(pieces)
        self._stop_checker = StopChecker(params.stop_strings) if params.stop_strings else None
        self.eager = stream or self._stop_checker is not None  # else nobody needs the text before the end
        self._num_decoded = 0  # of output_ids
        self._parts: list[str] = []  # the text so far, in pieces
        self._text_length = 0
        self._prompt_logprobs = LogprobColumns()
        self._output_logprobs = LogprobColumns()
        self._num_logprobs_told: int | None = None  # of the answer's tokens; None: not even the prompt's

    @property
    def ended(self) -> bool:
        return self.finish is not None or self.error is not None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self._prompt_ids)

    def start(self, start: Start) -> None:
        self._cached_tokens, self._lora_version = start.cached_tokens, start.lora_version

    def add_logprobs(self, chunk: LogprobChunk) -> None:
        (self._prompt_logprobs if chunk.prompt else self._output_logprobs).extend(chunk)

    def end(self, finish: Finish) -> None:
        """Note the scheduler's end. `advance` must follow: a stop string in the last tokens overrides it."""
        if finish.error is not None:
            self.error = error_from(finish.error)
        elif finish.reason == "stop":
            self.finish = Stop(finish.matched)
        else:
            self.finish = Length(len(self.output_ids))

    def abort(self, message: str) -> None:
        """End it here, with what was generated."""
        self.finish = Aborted(message)
        self.advance()

    def advance(self) -> bool:
        """Decode what arrived since the last call. True if a stop string was found, which then is the end."""
        for index in range(self._num_decoded, self._num_visible_ids()):
            part = self._decoder.feed(self.output_ids[index])
            self._num_decoded = index + 1
            if self._append(part):
                return True
        return self.ended and self._append(self._decoder.flush())

    def answer(self) -> Answer:
        """Everything up to the last `advance`, as the client gets it."""
        meta = MetaInfo(
            id=self.rid,
            finish_reason=self.finish,
            prompt_tokens=len(self._prompt_ids),
            completion_tokens=len(self.output_ids),
            cached_tokens=self._cached_tokens,
            e2e_latency=time.monotonic() - self.started_at,
            lora_name=self._prompt.lora_name,
            lora_version=self._lora_version,
        )
        if self._prompt.return_logprob:
            meta = self._with_logprobs(meta)
        index = msgspec.UNSET if self._index is None else self._index
        return Answer(text=self._text(), output_ids=self.output_ids.copy(), meta_info=meta, index=index)

    def _num_visible_ids(self) -> int:
        """All ids, but for the stop id that ended the sequence: it is counted, and not shown."""
        hidden = (
            isinstance(self.finish, Stop)
            and isinstance(self.finish.matched, int)
            and not self._params.no_stop_trim
        )
        return len(self.output_ids) - hidden

    def _append(self, part: str) -> bool:
        """Add text; True if that completes a stop string. None counts before `min_new_tokens` tokens are there."""
        if not part:
            return False
        self._parts.append(part)
        self._text_length += len(part)
        if self._stop_checker is None or self._num_decoded < self._params.min_new_tokens:
            return False
        match = self._stop_checker.feed(part)
        if match is None:
            return False
        self._cut(match, self._text_length - self._stop_checker.length)
        return True

    def _cut(self, match: StopMatch, offset: int) -> None:
        """End at a stop string. `offset`: length of the text before what the checker has seen."""
        end = offset + (match.end if self._params.no_stop_trim else match.start)
        self._parts = [self._joined()[:end]]
        del self.output_ids[self._num_decoded :]
        self._output_logprobs.truncate(self._num_decoded)
        self.finish, self.error = Stop(match.stop), None

    def _joined(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""

    def _text(self) -> str:
        text = self._joined()
        if self.ended or self._stop_checker is None or self._stop_checker.held == 0:
            return text
        return text[: -self._stop_checker.held]

    def _with_logprobs(self, meta: MetaInfo) -> MetaInfo:
        prompt = self._prompt
        pieces = self._tokenizer.pieces if prompt.return_text_in_logprobs else None
        prompt_columns, start = self._prompt_logprobs, self._num_logprobs_told or 0
        first = self._prompt_ids[prompt.logprob_start_len] if prompt.logprob_start_len >= 0 else None
        if self._num_logprobs_told is not None:
            prompt_columns, first = LogprobColumns(), None
        if prompt.new_logprobs_only:
            self._num_logprobs_told = len(self._output_logprobs)
        tops = prompt.top_logprobs_num > 0
        return msgspec.structs.replace(
            meta,
            input_token_logprobs=prompt_columns.tokens(pieces, first),
            output_token_logprobs=self._output_logprobs.tokens(pieces, start=start),
            input_top_logprobs=prompt_columns.tops(pieces, first) if tops else msgspec.UNSET,
            output_top_logprobs=self._output_logprobs.tops(pieces, start=start) if tops else msgspec.UNSET,
        )
