"""Where an adapter's two files come from, and their bytes: read once, into memory of our own.

Whatever happens to the files later cannot reach what is served.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

import msgspec

from manylora.lora.adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES
from manylora.runtime.errors import AdapterRejectedError

WEIGHTS_NAME = "adapter_model.safetensors"
UNSAFE_WEIGHTS_NAME = "adapter_model.bin"
MAX_WEIGHTS_BYTES = 16 * 1024**3
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")


class AdapterFile(msgspec.Struct, frozen=True):
    """The bytes of one adapter. `digest` is the SHA-256 over both files."""

    config: bytes
    weights: bytearray
    digest: str


def resolve_adapter(lora_path: str) -> Path:
    """The directory of an adapter: `lora_path` itself, or the hub repository of that id, downloaded if need be.

    Raises AdapterRejectedError that says where was looked.
    """
    try:
        directory = Path(lora_path).expanduser()
        is_dir, exists = directory.is_dir(), directory.exists()
    except (OSError, RuntimeError) as error:  # a name too long, a folder that may not be entered, ~nobody
        raise AdapterRejectedError(f"{lora_path} cannot be looked up: {error}", param="lora_path") from error
    if is_dir:
        return directory
    if exists:
        raise AdapterRejectedError(
            f"{lora_path} is a file; give the directory with {CONFIG_NAME}", param="lora_path"
        )
    if not _HUB_ID.fullmatch(lora_path):
        raise AdapterRejectedError(f"there is no adapter directory {directory.absolute()}", param="lora_path")
    return _download(lora_path)


def read_adapter(directory: Path) -> AdapterFile:
    """Read and digest both files. Raises AdapterRejectedError."""
    weights_path = directory / WEIGHTS_NAME
    if not os.path.exists(weights_path) and os.path.exists(directory / UNSAFE_WEIGHTS_NAME):
        raise AdapterRejectedError(
            f"{directory} has only {UNSAFE_WEIGHTS_NAME}, a pickle that can run code when loaded; save the adapter as "
            f"{WEIGHTS_NAME}",
            param="lora_path",
        )
    config = bytes(_read_file(directory / CONFIG_NAME, MAX_CONFIG_BYTES))
    weights = _read_file(weights_path, MAX_WEIGHTS_BYTES)
    digest = hashlib.sha256(len(config).to_bytes(8, "little") + config)
    digest.update(weights)
    return AdapterFile(config, weights, digest.hexdigest())


def _download(repo_id: str) -> Path:
    # Imported here: it takes a third of a second, and most servers never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterRejectedError(
            f"{repo_id} is neither a directory ({Path(repo_id).absolute()}) nor an adapter that could be fetched from the "
            f"hub: {reason}",
            param="lora_path",
        ) from error


def _read_file(path: Path, limit: int) -> bytearray:
    """The whole of a regular file of at most `limit` bytes."""
    try:
        with open(path, "rb", opener=_open_nonblocking) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterRejectedError(f"{path} is not a regular file", param="lora_path")
            if status.st_size > limit:
                raise AdapterRejectedError(
                    f"{path} is {status.st_size} bytes long; at most {limit} are read", param="lora_path"
                )
            data = bytearray(status.st_size)
            if file.readinto(data) < len(data):
                raise AdapterRejectedError(f"{path} became shorter while it was read", param="lora_path")
            return data
    except FileNotFoundError as error:
        raise AdapterRejectedError(f"there is no {path.absolute()}", param="lora_path") from error
    except OSError as error:
        raise AdapterRejectedError(f"{path} cannot be read: {error.strerror}", param="lora_path") from error


def _open_nonblocking(path: str, flags: int) -> int:
    """Opening a FIFO must not wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)
