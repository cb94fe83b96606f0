"""A running server described as one flat dictionary: `/get_server_info` and `Engine.get_server_info`."""

from __future__ import annotations

from typing import Any, get_type_hints

import msgspec

from manylora import __version__
from manylora.runtime.config import (
    AccessArgs,
    CacheArgs,
    HttpArgs,
    LogFormat,
    LoRAArgs,
    ModelArgs,
    ParallelArgs,
    ScheduleArgs,
    ServerConfig,
)
from manylora.runtime.messages import ServerInfo, State

_SECTIONS = ("model", "lora", "cache", "schedule", "parallel", "http", "access")
_KEY_FILES = ("api_key_file", "admin_key_file")
_OF_THE_RESOLVED = ("model_dir", "dtype", "device", "context_length", "max_total_tokens")


def _fields_of(*kinds: type[Any]) -> dict[str, Any]:
    return {name: hint for kind in kinds for name, hint in get_type_hints(kind, include_extras=True).items()}


def _describe_ledger() -> type[msgspec.Struct]:
    fields = _fields_of(State)
    del fields["call"]
    return msgspec.defstruct("Ledger", fields.items(), namespace={"__doc__": State.__doc__})


def _describe_fields() -> dict[str, Any]:
    fields = _fields_of(ModelArgs, LoRAArgs, CacheArgs, ScheduleArgs, ParallelArgs, HttpArgs, AccessArgs)
    fields |= dict.fromkeys(_KEY_FILES, bool)
    fields |= {"log_level": str, "log_format": LogFormat}
    return {
        **fields,
        **_fields_of(ServerInfo),
        "internal_states": list[_describe_ledger()],
        "version": str,
    }


# What `describe_server` returns, as a type: made of the types that say each part already.
ServerDescription = msgspec.defstruct(
    "ServerDescription",
    _describe_fields().items(),
    namespace={
        "__doc__": "Every setting by its own name, the sizes as they came out, and the scheduler's ledger."
    },
)


def describe_server(config: ServerConfig, info: ServerInfo, state: State) -> dict[str, Any]:
    """Every setting by its own name, the sizes as they came out, and the scheduler's ledger as `internal_states`.

    Of the files with keys only whether they were given.
    """
    settings: dict[str, Any] = {}
    for section in _SECTIONS:
        settings |= msgspec.to_builtins(getattr(config, section))
    for name in _KEY_FILES:
        settings[name] = settings[name] is not None
    sizes = msgspec.to_builtins(info)
    ledger = msgspec.to_builtins(state)
    del sizes["type"], ledger["type"], ledger["call"]
    settings |= {name: sizes.pop(name) for name in _OF_THE_RESOLVED}
    return {
        **settings,
        "log_level": config.log_level,
        "log_format": config.log_format,
        **sizes,
        "internal_states": [ledger],
        "version": __version__,
    }
