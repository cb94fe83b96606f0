"""What numbers and texts of a request may be, where it is not their type that is checked but a function with a message of
its own: for the published document. A test holds each bound against the check.
"""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

MAX_INPUTS = 1024  # texts or id lists in one call
MAX_N = 128
MAX_STOP_STRINGS = 32
MAX_STOP_LENGTH = 1024  # characters of one stop string
MAX_STOP_TOKEN_IDS = 64  # eos ids of the model included
MAX_TOP_LOGPROBS = 128
MAX_RID_LENGTH = 512  # characters; every event of a stream repeats it
MAX_LOGIT_BIASES = 300
MAX_LOGIT_BIAS = 100.0
MAX_GRAMMAR_BYTES = 1 << 17  # of one, as UTF-8
MAX_NAME_LENGTH = 512  # characters of an adapter's name
MAX_MESSAGES = 4096
MAX_PENALTY = 2
MAX_TEMPERATURE = 1e30  # workers hold these as float32, where neither this
MIN_REPETITION_PENALTY = 1e-30  # nor a logit divided by that overflows
NUM_INTS = 2**31  # those that are not negative
NUM_SEEDS = 2**63  # the same


def published(**schema: Any) -> Meta:
    return Meta(extra_json_schema=schema)


Temperature = Annotated[float, published(minimum=0, maximum=MAX_TEMPERATURE)]
TopP = Annotated[float, published(exclusiveMinimum=0, maximum=1)]
MinP = Annotated[float, published(minimum=0, maximum=1)]
TopK = Annotated[int, published(anyOf=[{"const": -1}, {"minimum": 1}], maximum=NUM_INTS - 1)]
Penalty = Annotated[float, published(minimum=-MAX_PENALTY, maximum=MAX_PENALTY)]
RepetitionPenalty = Annotated[float, published(minimum=MIN_REPETITION_PENALTY, maximum=MAX_PENALTY)]
TokenCount = Annotated[int, published(minimum=0, maximum=NUM_INTS - 1)]
Samples = Annotated[int, published(minimum=1, maximum=MAX_N)]
Seed = Annotated[int, published(minimum=0, maximum=NUM_SEEDS - 1)]
TokenId = Annotated[int, published(minimum=0, maximum=NUM_INTS - 1)]
TopLogprobs = Annotated[int, published(minimum=0, maximum=MAX_TOP_LOGPROBS)]
StopString = Annotated[str, published(minLength=1, maxLength=MAX_STOP_LENGTH)]
StopStrings = Annotated[list[StopString], published(maxItems=MAX_STOP_STRINGS)]
StopTokenIds = Annotated[list[TokenId], published(maxItems=MAX_STOP_TOKEN_IDS)]
RequestId = Annotated[str, published(maxLength=MAX_RID_LENGTH)]
TokenIds = Annotated[list[TokenId], published(minItems=1)]
AdapterName = Annotated[str, published(minLength=1, maxLength=MAX_NAME_LENGTH)]
Text = Annotated[str, published(minLength=1)]
Bias = Annotated[float, published(minimum=-MAX_LOGIT_BIAS, maximum=MAX_LOGIT_BIAS)]
LogitBiases = Annotated[dict[int, Bias], published(maxProperties=MAX_LOGIT_BIASES)]
GrammarText = Annotated[str, published(maxLength=MAX_GRAMMAR_BYTES)]
