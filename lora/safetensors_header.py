"""The header of a safetensors file, read with more suspicion than the library has.

The library accepts duplicate names, empty tensors, a million entries and any name; a server that loads files while it
runs should not. Format: 8 bytes little-endian header length, that many bytes of JSON, then the tensors' bytes without
gaps (https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from typing import Annotated, Any

import msgspec

from manylora.runtime.errors import AdapterRejectedError

MAX_HEADER_BYTES = 8 * 1024 * 1024
MAX_TENSORS = 16384
MAX_NAME = 512
MAX_DIMS = 8
DTYPE_SIZES = {"F32": 4, "F16": 2, "BF16": 2}


# JSON bounds neither numbers nor their count, and a product of thousands of long ones takes hours.
Size = Annotated[int, msgspec.Meta(le=(1 << 63) - 1)]


class TensorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor: its bytes are [data_offsets[0], data_offsets[1]) of the data, which follows the header."""

    dtype: str
    shape: Annotated[tuple[Size, ...], msgspec.Meta(max_length=MAX_DIMS)]
    data_offsets: tuple[Size, Size]


def read_header(read: Callable[[int], bytes], size: int) -> dict[str, TensorEntry]:
    """The tensors by name of a file of `size` bytes, whose next bytes `read(count)` gives: up to the data.

    Raises AdapterRejectedError.
    """
    if size < 8:
        raise _rejected(f"is {size} bytes long")
    (header_bytes,) = struct.unpack("<Q", read(8))
    if header_bytes > MAX_HEADER_BYTES:
        raise _rejected(f"claims a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are read")
    data_bytes = size - 8 - header_bytes
    if data_bytes < 0:
        raise _rejected("is cut off inside its header")
    entries = _entries(read(header_bytes))
    _check_extents(entries, data_bytes)
    return entries


def _entries(header: bytes) -> dict[str, TensorEntry]:
    try:
        fields = json.loads(header, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _rejected(f"has a header that is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _rejected("has a header that is not a JSON object")
    fields.pop("__metadata__", None)
    if not 1 <= len(fields) <= MAX_TENSORS:
        raise _rejected(f"holds {len(fields)} tensors; 1 to {MAX_TENSORS} are accepted")
    return {name: _entry(name, value) for name, value in fields.items()}


def _entry(name: str, value: object) -> TensorEntry:
    if len(name) > MAX_NAME or not name.isprintable():
        raise _rejected(f"has a tensor with the name {name[:40]!r}...")
    try:
        entry = msgspec.convert(value, TensorEntry)
    except msgspec.ValidationError as error:
        raise _rejected(f"describes tensor {name!r} wrongly: {error}", name) from error
    if entry.dtype not in DTYPE_SIZES:
        raise _rejected(
            f"has tensor {name!r} of dtype {entry.dtype[:16]}; supported are {', '.join(DTYPE_SIZES)}", name
        )
    if any(size < 1 for size in entry.shape):
        raise _rejected(f"has tensor {name!r} of shape {list(entry.shape)}", name)
    begin, end = entry.data_offsets
    if end - begin != math.prod(entry.shape) * DTYPE_SIZES[entry.dtype]:
        raise _rejected(f"has tensor {name!r} whose bytes do not agree with its shape and dtype", name)
    return entry


def _check_extents(entries: dict[str, TensorEntry], data_bytes: int) -> None:
    """Tensors cover the data exactly: no gap, no overlap, nothing missing, nothing behind."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1].data_offsets):
        begin, end = entry.data_offsets
        if begin != position:
            raise _rejected(f"has tensor {name!r} overlapping another or behind a gap", name)
        position = end
    if position != data_bytes:
        raise _rejected(f"has {data_bytes} bytes of data where its header describes {position}")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a name appears twice")
    return fields


def _rejected(problem: str, param: str | None = None) -> AdapterRejectedError:
    return AdapterRejectedError(f"the adapter's safetensors file {problem}", param=param)
