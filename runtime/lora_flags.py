"""The two flags with a grammar of their own: `--lora-paths` and `--lora-target-modules`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import msgspec

from manylora.lora.page_layout import MODULES
from manylora.runtime.config import LoRAPath
from manylora.runtime.errors import ConfigError

# Names of fused projections, as the models' own code calls them.
_FUSED_MODULES = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def parse_lora_paths(value: Any) -> tuple[LoRAPath, ...]:
    """Entries of --lora-paths: PATH (which is its name too), NAME=PATH, or the JSON form, mixed as one likes.

    From Python also a dict name -> path, and dicts of the JSON form. Raises ConfigError.
    """
    if value is None:
        return ()
    if isinstance(value, Mapping):
        pairs = cast("Mapping[str, str]", value)
        value = [{"lora_name": name, "lora_path": path} for name, path in pairs.items()]
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(f"--lora-paths takes a list, got {value!r}", param="lora_paths")
    paths = tuple(_lora_path(entry) for entry in cast("Iterable[Any]", value))
    names: set[str] = set()
    for path in paths:
        if path.lora_name in names:
            raise ConfigError(f"--lora-paths names {path.lora_name!r} twice", param="lora_paths")
        names.add(path.lora_name)
    return paths


def parse_target_modules(value: Any) -> tuple[str, ...] | None:
    """Modules of --lora-target-modules in their usual order; None for `all`, which must stand alone."""
    if value is None or value == "all":
        return None
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise ConfigError(
            f"--lora-target-modules takes a list of modules or `all`, got {value!r}",
            param="lora_target_modules",
        )
    names = [str(name) for name in cast("Iterable[Any]", value)]
    if not names:
        raise ConfigError("--lora-target-modules is empty", param="lora_target_modules")
    if "all" in names:
        if len(names) > 1:
            raise ConfigError(
                "--lora-target-modules: `all` cannot be combined with others", param="lora_target_modules"
            )
        return None
    wanted: set[str] = set()
    for name in names:
        if name not in MODULES and name not in _FUSED_MODULES:
            raise ConfigError(
                f"--lora-target-modules: {name!r} is not supported; "
                f"supported are {', '.join((*MODULES, *_FUSED_MODULES))} and all",
                param="lora_target_modules",
            )
        wanted.update(_FUSED_MODULES.get(name, (name,)))
    return tuple(module for module in MODULES if module in wanted)


def _lora_path(entry: Any) -> LoRAPath:
    if isinstance(entry, LoRAPath):
        path = entry
    elif isinstance(entry, Mapping):
        path = _from_keys(dict(cast("Mapping[str, Any]", entry)), repr(cast("object", entry)))
    elif not isinstance(entry, str):
        raise ConfigError(f"--lora-paths: {entry!r} is neither text nor a dict", param="lora_paths")
    elif entry.startswith("{"):
        try:
            keys = msgspec.json.decode(entry)
        except msgspec.DecodeError as error:
            raise ConfigError(
                f"--lora-paths: {entry} is not valid JSON: {error}", param="lora_paths"
            ) from error
        path = _from_keys(keys, entry)
    else:
        name, separator, location = entry.partition("=")
        path = LoRAPath(name, location) if separator else LoRAPath(entry, entry)
    if not path.lora_name or not path.lora_path:
        raise ConfigError(f"--lora-paths: {entry!r} lacks a name or a path", param="lora_paths")
    return path


def _from_keys(keys: dict[str, Any], shown: str) -> LoRAPath:
    if not {"lora_name", "lora_path"} <= keys.keys():
        raise ConfigError(
            f"--lora-paths: {shown} looks like JSON but does not contain the keys lora_name and lora_path",
            param="lora_paths",
        )
    try:
        return msgspec.convert(keys, LoRAPath)
    except msgspec.ValidationError as error:
        raise ConfigError(f"--lora-paths: {shown}: {error}", param="lora_paths") from error
