"""What is refused before anything is done about it: names and loads that cannot be. Texts of the server we stand in for."""

from __future__ import annotations

from collections.abc import Mapping

from manylora.runtime.bounds import MAX_NAME_LENGTH
from manylora.runtime.errors import (
    AdapterBusyError,
    AdapterExistsError,
    AdapterLimitError,
    AdapterNotFoundError,
    BadRequestError,
    LoRADisabledError,
    VersionConflictError,
)
from manylora.runtime.messages import NO_VERSION, LoadAdapter, UnloadAdapter, UpdateAdapter
from manylora.scheduler.version import Version


def check_requested(names: set[str], loaded: Mapping[str, Version], *, enabled: bool) -> None:
    """Raise unless requests may name every one of `names`."""
    if names and not enabled:
        raise LoRADisabledError(
            f"LoRA adapter '{min(names)}' was requested, but LoRA is not enabled. Please launch the server with "
            "--enable-lora flag and preload adapters using --lora-paths or /load_lora_adapter endpoint.",
            param="lora_path",
        )
    if missing := names - loaded.keys():
        raise AdapterNotFoundError(
            f"The following requested LoRA adapters are not loaded: {', '.join(sorted(missing))}\n"
            f"Loaded adapters: {', '.join(loaded)}",
            param="lora_path",
        )


def check_version(name: str, if_version: int | None, current: Version | None) -> None:
    """Raise unless `current`, what `name` stands for, is the version that the caller means; None means any."""
    number = current.id if current else NO_VERSION
    if if_version is None or if_version == number:
        return
    expected = f"version {if_version}" if if_version else "no version (0)"
    found = f"is at version {number}" if current else "is not loaded, which is version 0"
    raise VersionConflictError(f"LoRA adapter {name} {found}; {expected} was expected.", param="if_version")


def check_unload(
    call: UnloadAdapter,
    loaded: Mapping[str, Version],
    loading: Mapping[str, LoadAdapter],
    going: Version | None,
    *,
    enabled: bool,
) -> Version:
    """The version to unload. `going`: what the name stood for, if its unload is under way, which only a call with a time
    of its own may join.
    """
    _check_enabled(enabled)
    name = call.lora_name
    version = loaded.get(name)
    if version is None and name in loading:
        raise AdapterBusyError(f"LoRA with name {name} is being loaded.", param="lora_name")
    if version is None and going is not None:
        if call.drain_s is None:
            raise AdapterBusyError(f"LoRA with name {name} is being unloaded.", param="lora_name")
        version = going
    if version is None:
        raise _not_loaded(name, loaded)
    check_version(name, call.if_version, version)
    return version


def check_update(
    call: UpdateAdapter,
    loaded: Mapping[str, Version],
    loading: Mapping[str, LoadAdapter],
    *,
    enabled: bool,
    max_pinned: int,
) -> Version:
    """The version to change."""
    _check_enabled(enabled)
    if (version := loaded.get(call.lora_name)) is None:
        raise _not_loaded(call.lora_name, loaded)
    check_version(call.lora_name, call.if_version, version)
    if call.pinned and not version.pinned:
        _check_pins(call.lora_name, loaded, loading, max_pinned, "pin")
    return version


def check_load(
    call: LoadAdapter,
    loaded: Mapping[str, Version],
    loading: Mapping[str, LoadAdapter],
    *,
    enabled: bool,
    max_pinned: int,
) -> None:
    """Raise unless the load may start. `loading`: the calls under way, by name."""
    name = call.lora_name
    _check_enabled(enabled)
    if not name or len(name) > MAX_NAME_LENGTH or not name.isprintable() or name != name.strip():
        raise BadRequestError(
            f"lora_name must be 1 to {MAX_NAME_LENGTH} printable characters without blanks around them.",
            param="lora_name",
        )
    if not call.lora_path:
        raise BadRequestError("lora_path must not be empty.", param="lora_path")
    check_version(name, call.if_version, loaded.get(name))
    if name in loading:
        raise AdapterExistsError(f"LoRA with name {name} is being loaded.", param="lora_name")
    if name in loaded and not call.replace:
        raise AdapterExistsError(
            f"LoRA with name {name} already exists. Loaded LoRAs: {', '.join(loaded)}", param="lora_name"
        )
    if call.pinned:
        _check_pins(name, loaded, loading, max_pinned, "load")


def _check_pins(
    name: str,
    loaded: Mapping[str, Version],
    loading: Mapping[str, LoadAdapter],
    max_pinned: int,
    verb: str,
) -> None:
    pins = sum(version.pinned for other, version in loaded.items() if other != name)
    pins += sum(call.pinned for other, call in loading.items() if other != name)
    if pins >= max_pinned:
        raise AdapterLimitError(
            f"Failed to {verb} LoRA adapter {name} as a pinned adapter. It is not allowed to pin all slots in the "
            "LoRA memory pool to avoid starvation for unpinned adapters and base models. Please increase your "
            "`--max-loras-per-batch` or load it as unpinned LoRA adapters.",
            param="pinned",
        )


def _not_loaded(name: str, loaded: Mapping[str, Version]) -> AdapterNotFoundError:
    return AdapterNotFoundError(
        f"LoRA with name {name} does not exist. Loaded LoRAs: {', '.join(loaded)}", param="lora_name"
    )


def _check_enabled(enabled: bool) -> None:
    if not enabled:
        raise LoRADisabledError("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
