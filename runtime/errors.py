"""Every error a user can meet, in one hierarchy.

Each class fixes a stable `code` (a word clients may test for) and an HTTP `status`. To add one: subclass, give both,
say in the docstring when it is raised. Across processes an error travels as `ErrorInfo`, a plain value.
`assert` is for what only a bug of ours can break.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import msgspec


class ErrorInfo(msgspec.Struct, frozen=True):
    """An error as a value: what goes over a pipe and into a JSON body."""

    code: str
    message: str
    status: int
    param: str | None = None


class ManyloraError(Exception):
    """Base of all. `param` names the field, flag or tensor at fault."""

    code: ClassVar[str] = "internal_error"
    status: ClassVar[int] = 500

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param

    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.message, self.status, self.param)


class RemoteError(ManyloraError):
    """An `ErrorInfo` that arrived from another process, raised here with its own code and status."""

    def __init__(self, error: ErrorInfo) -> None:
        super().__init__(error.message, param=error.param)
        self._error = error

    def info(self) -> ErrorInfo:
        return self._error


class ConfigError(ManyloraError, ValueError):
    """A flag, a combination of flags, or the machine does not allow a start. Ends the launch with one line."""

    code = "bad_config"
    status = 400


class ModelNotFoundError(ConfigError):
    """`--model-path` is neither a directory with a model nor a hub id that could be fetched."""

    code = "model_not_found"


class ModelUnsupportedError(ConfigError):
    """The model's config asks for something that is not implemented; the message names it."""

    code = "model_unsupported"


class OutOfMemoryError(ConfigError):
    """Weights and the smallest useful page pool do not fit."""

    code = "out_of_memory"


class BadRequestError(ManyloraError, ValueError):
    """The request's body is malformed or a field is out of range."""

    code = "invalid_request"
    status = 400


class MalformedHttpError(ManyloraError):
    """What arrived is not HTTP, or a line of its head is too long. The connection is closed."""

    code = "malformed_http"
    status = 400


class RouteNotFoundError(ManyloraError):
    """There is no such path."""

    code = "not_found"
    status = 404


class MethodNotAllowedError(ManyloraError):
    """The path has no such method; the header `Allow` names those it has. HEAD and OPTIONS are none of them."""

    code = "method_not_allowed"
    status = 405


class BodyTimeoutError(ManyloraError):
    """The body did not arrive in time."""

    code = "request_timeout"
    status = 408


class BodyTooLargeError(ManyloraError):
    """The body exceeds 32 MiB."""

    code = "request_entity_too_large"
    status = 413


class ExpectationFailedError(ManyloraError):
    """The header `Expect` asks for something else than `100-continue`."""

    code = "expectation_failed"
    status = 417


class UnauthorizedError(ManyloraError):
    """The server was given keys, and the request has none or one that is not known."""

    code = "unauthorized"
    status = 401


class ForbiddenError(ManyloraError):
    """The request's key is known but does not open this route: an API key where an admin key is asked for."""

    code = "forbidden"
    status = 403


class AdapterPathForbiddenError(ManyloraError):
    """`--adapter-root` and `--allow-hub` do not allow to load from there, whether or not there is something."""

    code = "adapter_path_forbidden"
    status = 403


class ContextLengthError(BadRequestError):
    """Prompt and new tokens exceed the context, or can never fit the page pool. Never cut silently."""

    code = "context_length_exceeded"


class BadGrammarError(BadRequestError):
    """A `json_schema`, `regex` or `ebnf` is malformed, uses what is not supported, or no token can go on with its text."""

    code = "bad_grammar"


class GrammarTooComplexError(BadRequestError):
    """A grammar exceeds a limit: its size, the time or memory to compile it, or the work of one of its steps."""

    code = "grammar_too_complex"


class AdapterNotFoundError(BadRequestError):
    """A request or an unload names an adapter that is not loaded. 404 on the routes below /v1/adapters."""

    code = "adapter_not_found"


class UnknownModelError(ManyloraError):
    """`model` of an OpenAI-style request is neither the base model nor a loaded adapter."""

    code = "model_not_found"
    status = 404


class NoChatTemplateError(BadRequestError):
    """A chat was asked of a model that has no chat template."""

    code = "no_chat_template"


class ChatTemplateError(BadRequestError):
    """The chat template refused the messages, failed, or did not end in time."""

    code = "chat_template_failed"


class RequestAbortedError(ManyloraError):
    """An OpenAI-style request was ended by `/abort_request`: those have no finish reason that would say so."""

    code = "request_aborted"
    status = 499


class LoRADisabledError(BadRequestError):
    """Adapters were asked of a server started without `--enable-lora` or `--lora-paths`."""

    code = "lora_disabled"


class AdapterExistsError(BadRequestError):
    """A load of a name that is loaded, without `replace: true`; or while the same name is being loaded. 409 on the routes
    below /v1/adapters.
    """

    code = "adapter_exists"


class AdapterBusyError(BadRequestError):
    """An unload of an adapter whose first load, or whose unload, is under way. 409 on the routes below /v1/adapters."""

    code = "adapter_busy"


class VersionConflictError(BadRequestError):
    """`if_version` is not the version that the adapter is at; the message says which one is."""

    code = "version_conflict"
    status = 409


class AdapterUnloadedError(ManyloraError):
    """The adapter was unloaded, and the time that its requests were given is over. 410, since to try again does not help
    and common clients do try again after 409 or 5xx.
    """

    code = "adapter_unloaded"
    status = 410


class AdapterRejectedError(BadRequestError):
    """The adapter's files cannot be served: missing, malformed, of a wrong shape, or of an unsupported kind. 422 on the
    routes below /v1/adapters, as is AdapterChangedError.
    """

    code = "adapter_rejected"


class AdapterChangedError(AdapterRejectedError):
    """The files behind a registered version were re-read and no longer have its digest."""

    code = "adapter_changed"


class AdapterLimitError(BadRequestError):
    """The adapter exceeds `--max-lora-rank`, `--lora-target-modules`, the pin limit, or can never fit in memory. 409 on the
    routes below /v1/adapters: it is the server's limits and what else is loaded that stand against it, so not a 5xx.
    """

    code = "adapter_limit"


class NotReadyError(ManyloraError):
    """The server is still starting."""

    code = "not_ready"
    status = 503


class QueueFullError(ManyloraError):
    """The bounded queue is full; nothing of the call was accepted."""

    code = "queue_full"
    status = 503


class BusyError(ManyloraError):
    """The operation needs an idle server (`/flush_cache` while requests run)."""

    code = "busy"
    status = 400


class ShuttingDownError(ManyloraError):
    """The server was told to stop before the request could end."""

    code = "shutting_down"
    status = 503


class WorkerCrashedError(ManyloraError):
    """A process of the server died under the request."""

    code = "worker_crashed"
    status = 500


class NonFiniteLogitsError(ManyloraError):
    """The weights that answer produced NaN or infinity; no token can be drawn honestly."""

    code = "non_finite_logits"
    status = 500


class ProtocolError(ManyloraError):
    """A pipe broke its contract: a gap in the sequence, an unknown epoch, a message that does not decode."""

    code = "protocol_error"
    status = 500


def error_from(info: ErrorInfo) -> ManyloraError:
    """The exception that `info` was made from: its own class where the code is one of ours, else RemoteError."""
    for kind in _all_errors(ManyloraError):
        if kind.code == info.code and kind.status == info.status and kind is not RemoteError:
            return kind(info.message, param=info.param)
    return RemoteError(info)


def _all_errors(base: type[ManyloraError]) -> Iterator[type[ManyloraError]]:
    yield base
    for kind in base.__subclasses__():
        yield from _all_errors(kind)
