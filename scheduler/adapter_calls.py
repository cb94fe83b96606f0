"""What is refused before anything is done about it: names and loads that cannot be. Texts of the server we stand in for."""

from __future__ import annotations

from collections.abc import Mapping

from manylora.runtime.errors import (
    AdapterExistsError,
    AdapterLimitError,
    AdapterNotFoundError,
    BadRequestError,
    LoRADisabledError,
)
from manylora.runtime.messages import LoadAdapter
from manylora.scheduler.version import Version

MAX_NAME_LENGTH = 512


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


def check_unload(name: str, loaded: Mapping[str, Version], *, enabled: bool) -> None:
    """Raise unless `name` stands for a version."""
    _check_enabled(enabled)
    if name not in loaded:
        raise AdapterNotFoundError(
            f"LoRA with name {name} does not exist. Loaded LoRAs: {', '.join(loaded)}", param="lora_name"
        )


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
    if name in loading:
        raise AdapterExistsError(f"LoRA with name {name} is being loaded.", param="lora_name")
    if name in loaded and not call.replace:
        raise AdapterExistsError(
            f"LoRA with name {name} already exists. Loaded LoRAs: {', '.join(loaded)}", param="lora_name"
        )
    pins = sum(version.pinned for other, version in loaded.items() if other != name)
    pins += sum(other.pinned for other in loading.values())
    if call.pinned and pins >= max_pinned:
        raise AdapterLimitError(
            f"Failed to load LoRA adapter {name} as a pinned adapter. It is not allowed to pin all slots in the "
            "LoRA memory pool to avoid starvation for unpinned adapters and base models. Please increase your "
            "`--max-loras-per-batch` or load it as unpinned LoRA adapters.",
            param="pinned",
        )


def _check_enabled(enabled: bool) -> None:
    if not enabled:
        raise LoRADisabledError("LoRA is not enabled. Please set `--enable-lora` to enable LoRA.")
