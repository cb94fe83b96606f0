"""Where an adapter's two files come from, and their bytes: each read once, into memory of our own, and digested there.

Whatever happens to the files while they are read, the digest is of the bytes that were used; a file that becomes
shorter is an error, which it would not be for a mapped one.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from io import FileIO
from pathlib import Path
from types import TracebackType

from manylora.lora.adapter_config import CONFIG_NAME, MAX_CONFIG_BYTES
from manylora.runtime.adapter_access import HUB_ID, Permit, check_below
from manylora.runtime.errors import AdapterRejectedError

WEIGHTS_NAME = "adapter_model.safetensors"
UNSAFE_WEIGHTS_NAME = "adapter_model.bin"
MAX_WEIGHTS_BYTES = 16 * 1024**3
_REST_BYTES = 1 << 20  # of a file that is only digested, at a time
_REVISION = re.compile(r"[0-9a-f]{40}")


class AdapterFile:
    """An adapter under reading, front to back.

    config: the whole of its configuration; size: bytes of its weights file.
    """

    def __init__(self, config: bytes, path: Path, weights: FileIO, size: int) -> None:
        self.config = config
        self.size = size
        self._path = path
        self._weights = weights
        self._left = size
        self._hash = hashlib.sha256(len(config).to_bytes(8, "little") + config)

    def __enter__(self) -> AdapterFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._weights.close()

    def read(self, count: int) -> bytes:
        """The next `count` bytes of the weights file. Raises as `read_into`."""
        data = bytearray(count)
        self.read_into(memoryview(data))
        return bytes(data)

    def read_into(self, memory: memoryview) -> None:
        """Fill `memory` with the next bytes of the weights file. Raises AdapterRejectedError if they are not there."""
        filled = 0
        while filled < len(memory):
            try:
                count = self._weights.readinto(memory[filled:])
            except OSError as error:
                raise _unreadable(self._path, error) from error
            if not count:
                raise AdapterRejectedError(
                    f"{self._path} became shorter while it was read", param="lora_path"
                )
            filled += count
        self._hash.update(memory)
        self._left -= filled

    def digest(self) -> str:
        """The SHA-256 over both files, after reading what is left of the weights."""
        memory = memoryview(bytearray(min(self._left, _REST_BYTES)))
        while self._left:
            self.read_into(memory[: self._left])
        return self._hash.hexdigest()


def resolve_adapter(permit: Permit) -> Path:
    """The directory of an adapter: the permitted path itself, or the hub repository of that id, downloaded if need be.

    Raises AdapterRejectedError that says where was looked.
    """
    lora_path = permit.path
    if permit.hub_only:
        return _download(lora_path, "not an adapter")
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
    if not HUB_ID.fullmatch(lora_path):
        raise AdapterRejectedError(f"there is no adapter directory {directory.absolute()}", param="lora_path")
    return _download(lora_path, f"neither a directory ({directory.absolute()}) nor an adapter")


def hub_revision(directory: Path) -> str:
    """The commit that `directory` is a snapshot of, "" where it is none of the hub's cache."""
    is_snapshot = directory.parent.name == "snapshots" and directory.parent.parent.name.startswith("models--")
    return directory.name if is_snapshot and _REVISION.fullmatch(directory.name) else ""


def open_adapter(directory: Path, root: str = "") -> AdapterFile:
    """Read the configuration and begin with the weights; the caller closes it.

    Raises AdapterRejectedError, or AdapterPathForbiddenError if there is a `root` and a file lies elsewhere.
    """
    weights_path = directory / WEIGHTS_NAME
    for path in (directory / CONFIG_NAME, weights_path):
        check_below(os.path.realpath(path), root)  # before a look at whether there is such a file
    if not os.path.exists(weights_path) and os.path.exists(directory / UNSAFE_WEIGHTS_NAME):
        raise AdapterRejectedError(
            f"{directory} has only {UNSAFE_WEIGHTS_NAME}, a pickle that can run code when loaded; save the adapter as "
            f"{WEIGHTS_NAME}",
            param="lora_path",
        )
    config_path = directory / CONFIG_NAME
    file, size = _open_regular(config_path, MAX_CONFIG_BYTES, root)
    with AdapterFile(b"", config_path, file, size) as config_file:
        config = config_file.read(size)
    file, size = _open_regular(weights_path, MAX_WEIGHTS_BYTES, root)
    return AdapterFile(config, weights_path, file, size)


def _download(repo_id: str, otherwise: str) -> Path:
    """`otherwise`: what the id is if the hub has it not."""
    # Imported here: it takes a third of a second, and most servers never need it.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        return Path(snapshot_download(repo_id, allow_patterns=[CONFIG_NAME, WEIGHTS_NAME]))
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise AdapterRejectedError(
            f"{repo_id} is {otherwise} that could be fetched from the hub: {reason}", param="lora_path"
        ) from error


def _open_regular(path: Path, limit: int, root: str) -> tuple[FileIO, int]:
    """A regular file of at most `limit` bytes, and its size. With a root, one that lies below it."""
    try:
        file = open(path, "rb", buffering=0, opener=_open_nonblocking)  # noqa: SIM115  the caller closes it
    except FileNotFoundError as error:
        raise AdapterRejectedError(f"there is no {path.absolute()}", param="lora_path") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:  # of the file that is open now, whatever has become of the links that led to it
        check_below(os.readlink(f"/proc/self/fd/{file.fileno()}"), root)
    except BaseException:
        file.close()
        raise
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
        return file, status.st_size
    file.close()
    if not stat.S_ISREG(status.st_mode):
        raise AdapterRejectedError(f"{path} is not a regular file", param="lora_path")
    raise AdapterRejectedError(
        f"{path} is {status.st_size} bytes long; at most {limit} are read", param="lora_path"
    )


def _unreadable(path: Path, error: OSError) -> AdapterRejectedError:
    return AdapterRejectedError(f"{path} cannot be read: {error.strerror}", param="lora_path")


def _open_nonblocking(path: str, flags: int) -> int:
    """Opening a FIFO must not wait for its writer."""
    return os.open(path, flags | os.O_NONBLOCK)
