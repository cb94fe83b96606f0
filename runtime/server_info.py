"""A running server described as one flat dictionary: `/get_server_info` and `Engine.get_server_info`."""

from __future__ import annotations

from typing import Any

import msgspec

from manylora import __version__
from manylora.runtime.config import ServerConfig
from manylora.runtime.messages import ServerInfo, State

_SECTIONS = ("model", "lora", "cache", "schedule", "parallel", "http", "access")
_KEY_FILES = ("api_key_file", "admin_key_file")
_OF_THE_RESOLVED = ("model_dir", "dtype", "device", "context_length", "max_total_tokens")


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
