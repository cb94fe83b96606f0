"""The sampling parameters of the seeds' `/generate`, validated with their messages."""

from __future__ import annotations

import msgspec

from manylora.runtime.bounds import (
    MAX_GRAMMAR_BYTES,
    MAX_LOGIT_BIAS,
    MAX_LOGIT_BIASES,
    MAX_N,
    MAX_PENALTY,
    MAX_STOP_STRINGS,
    MAX_TEMPERATURE,
    MIN_REPETITION_PENALTY,
    NUM_INTS,
    NUM_SEEDS,
    GrammarText,
    LogitBiases,
    MinP,
    Penalty,
    RepetitionPenalty,
    Samples,
    Seed,
    StopString,
    StopStrings,
    StopTokenIds,
    Temperature,
    TokenCount,
    TopK,
    TopP,
)
from manylora.runtime.errors import BadRequestError, GrammarTooComplexError

GREEDY_TEMPERATURE = 1e-6  # below this a request is greedy, as in the seeds
DEFAULT_MAX_NEW_TOKENS = 128
GRAMMAR_FIELDS = ("json_schema", "regex", "ebnf")


class SamplingParams(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One request's parameters as the client wrote them.

    `max_new_tokens` None means "not given": 128, or what the context leaves if that is less.
    `seed` None means "not given": the scheduler draws one. Unknown fields are refused, not ignored.
    """

    temperature: Temperature = 1.0
    top_p: TopP = 1.0
    top_k: TopK = -1
    min_p: MinP = 0.0
    max_new_tokens: TokenCount | None = None
    min_new_tokens: TokenCount = 0
    stop: StopString | StopStrings | None = None
    stop_token_ids: StopTokenIds | None = None
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    frequency_penalty: Penalty = 0.0
    presence_penalty: Penalty = 0.0
    repetition_penalty: RepetitionPenalty = 1.0
    n: Samples = 1
    seed: Seed | None = None
    sampling_seed: Seed | None = None  # the seeds' newer name for `seed`
    logit_bias: LogitBiases | None = None  # token id -> added to its logit
    # At most one of them: what the text must match. A JSON schema is given as JSON text.
    json_schema: GrammarText | None = None
    regex: GrammarText | None = None
    ebnf: GrammarText | None = None

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        return self.frequency_penalty != 0 or self.presence_penalty != 0 or self.repetition_penalty != 1

    @property
    def grammar(self) -> tuple[str, str] | None:
        """The field that says what the text must match, and its value; None if any text will do."""
        for field in GRAMMAR_FIELDS:
            if (text := getattr(self, field)) is not None:
                return field, text
        return None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_TEMPERATURE or self.top_k == 1

    def validate(self, vocab_size: int, default_new_tokens: int = DEFAULT_MAX_NEW_TOKENS) -> None:
        """Raise BadRequestError naming the first field that is out of range. default_new_tokens: what max_new_tokens is
        at most where it is not given.
        """
        if not 0 <= self.temperature <= MAX_TEMPERATURE:
            _refuse(
                "temperature",
                f"temperature must be a non-negative number of at most {MAX_TEMPERATURE:g}, got {self.temperature}.",
            )
        if not 0 < self.top_p <= 1:
            _refuse("top_p", f"top_p must be in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            _refuse("min_p", f"min_p must be in [0, 1], got {self.min_p}.")
        if self.top_k == 0 or not -1 <= self.top_k < NUM_INTS:
            _refuse("top_k", f"top_k must be -1 (disable) or in [1, 2^31), got {self.top_k}.")
        if not -MAX_PENALTY <= self.frequency_penalty <= MAX_PENALTY:
            _refuse(
                "frequency_penalty", f"frequency_penalty must be in [-2, 2], got {self.frequency_penalty}."
            )
        if not -MAX_PENALTY <= self.presence_penalty <= MAX_PENALTY:
            _refuse("presence_penalty", f"presence_penalty must be in [-2, 2], got {self.presence_penalty}.")
        if not MIN_REPETITION_PENALTY <= self.repetition_penalty <= MAX_PENALTY:
            _refuse(
                "repetition_penalty",
                f"repetition_penalty must be in [{MIN_REPETITION_PENALTY:g}, 2], got {self.repetition_penalty}.",
            )
        self._validate_counts(vocab_size, default_new_tokens)
        self._validate_biases(vocab_size)
        self._validate_grammar()

    def _validate_counts(self, vocab_size: int, default_new_tokens: int) -> None:
        limit = default_new_tokens if self.max_new_tokens is None else self.max_new_tokens
        if not 0 <= limit < NUM_INTS:
            _refuse("max_new_tokens", f"max_new_tokens must be in [0, 2^31), got {limit}.")
        if not 0 <= self.min_new_tokens <= limit:
            _refuse(
                "min_new_tokens",
                f"min_new_tokens must be in [0, max_new_tokens({limit})], got {self.min_new_tokens}.",
            )
        if not 1 <= self.n <= MAX_N:
            _refuse("n", f"n must be in [1, {MAX_N}], got {self.n}.")
        if len(self.stop_strings) > MAX_STOP_STRINGS or not all(self.stop_strings):
            _refuse("stop", f"stop takes at most {MAX_STOP_STRINGS} strings, none of them empty.")
        for token in self.stop_token_ids or ():
            if not 0 <= token < vocab_size:
                _refuse(
                    "stop_token_ids", f"stop_token_ids holds {token}, the vocabulary has {vocab_size} tokens."
                )
        for name, seed in (("seed", self.seed), ("sampling_seed", self.sampling_seed)):
            if seed is not None and not 0 <= seed < NUM_SEEDS:
                _refuse(name, f"{name} must be in [0, 2^63), got {seed}.")

    def _validate_biases(self, vocab_size: int) -> None:
        biases = self.logit_bias or {}
        if len(biases) > MAX_LOGIT_BIASES:
            _refuse("logit_bias", f"logit_bias takes at most {MAX_LOGIT_BIASES} tokens, got {len(biases)}.")
        for token, bias in biases.items():
            if not 0 <= token < vocab_size:
                _refuse("logit_bias", f"logit_bias holds {token}, the vocabulary has {vocab_size} tokens.")
            if not -MAX_LOGIT_BIAS <= bias <= MAX_LOGIT_BIAS:
                _refuse("logit_bias", f"logit_bias must be in [-100, 100], got {bias} for token {token}.")

    def _validate_grammar(self) -> None:
        given = [name for name in GRAMMAR_FIELDS if getattr(self, name) is not None]
        if len(given) > 1:
            _refuse(given[1], f"{' and '.join(given)} are given; at most one of them is possible.")
        if self.grammar is None:
            return
        name, text = self.grammar
        size = len(text.encode("utf-8", "surrogatepass"))
        if size > MAX_GRAMMAR_BYTES:
            raise GrammarTooComplexError(
                f"{name} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are possible.",
                param=f"sampling_params.{name}",
            )


def _refuse(param: str, message: str) -> None:
    raise BadRequestError(message, param=f"sampling_params.{param}")
