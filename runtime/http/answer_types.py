"""The JSON that several routes answer: errors, and what the server says of itself."""

from __future__ import annotations

from typing import Literal

import msgspec

from manylora.runtime.errors import ErrorInfo


class ErrorDetail(msgspec.Struct, frozen=True):
    """`code` is a word that programs may test for, `param` the field, parameter or header at fault."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    code: str
    param: str | None


class ErrorBody(msgspec.Struct, frozen=True):
    """Every error, in a response or in a stream."""

    error: ErrorDetail

    @classmethod
    def of(cls, error: ErrorInfo) -> ErrorBody:
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        return cls(ErrorDetail(error.message, kind, error.code, error.param))


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """`/get_model_info`. Paths as they were given."""

    model_path: str
    tokenizer_path: str
    is_generation: bool = True
    preferred_sampling_params: None = None
    weight_version: str = "default"
