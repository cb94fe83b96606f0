"""Finding and reading an adapter's files, and everything a safetensors file can have wrong."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.lora.adapter_file import read_adapter, resolve_adapter
from manylora.lora.safetensors_header import MAX_DIMS, MAX_HEADER_BYTES, MAX_TENSORS, read_header
from manylora.runtime.errors import AdapterRejectedError
from tests.lora.adapters import write_adapter


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", {"a": torch.ones(2, 3), "b": torch.ones(4)})


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_directory_is_itself(adapter: Path) -> None:
    assert resolve_adapter(str(adapter)) == adapter


@pytest.mark.parametrize("lora_path", ["/nowhere/at/all", "./nowhere", "a/b/c", "http://host/x"])
def test_a_path_that_is_no_hub_id_is_not_looked_up(
    lora_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterRejectedError, match="no adapter directory /"):
        resolve_adapter(lora_path)


@pytest.mark.parametrize("lora_path", ["~nobody-of-that-name/adapter", "/" + "long" * 1000])
def test_a_path_that_cannot_be_looked_up(lora_path: str) -> None:
    with pytest.raises(AdapterRejectedError, match="cannot be looked up"):
        resolve_adapter(lora_path)


def test_an_unknown_hub_id_says_where_was_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdapterRejectedError, match=r"someone/some-adapter is neither a directory \(/.*hub"):
        resolve_adapter("someone/some-adapter")


def test_a_file_is_not_a_directory(adapter: Path) -> None:
    with pytest.raises(AdapterRejectedError, match="give the directory"):
        resolve_adapter(str(adapter / "adapter_config.json"))


def test_the_digest_is_of_both_files(adapter: Path) -> None:
    first = read_adapter(adapter)
    assert first.digest == read_adapter(adapter).digest
    assert bytes(first.weights) == (adapter / "adapter_model.safetensors").read_bytes()
    seen = {first.digest}
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        with (adapter / name).open("ab") as file:
            file.write(b" ")
        seen.add(read_adapter(adapter).digest)
    assert len(seen) == 3


def test_what_was_read_does_not_change_with_the_file(adapter: Path) -> None:
    file = read_adapter(adapter)
    before = bytes(file.weights)
    (adapter / "adapter_model.safetensors").write_bytes(b"gone")
    assert bytes(file.weights) == before


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterRejectedError, match=f"there is no .*{name}"):
        read_adapter(adapter)


def test_pickled_weights_are_refused_by_name(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterRejectedError, match=r"only adapter_model\.bin, a pickle"):
        read_adapter(adapter)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_only_regular_files_are_read(adapter: Path, make: Callable[[Path], None]) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    make(adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterRejectedError, match=r"is not a regular file|: Is a directory"):
        read_adapter(adapter)


def test_a_long_config_is_not_read(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(b" " * (256 * 1024 + 1))
    with pytest.raises(AdapterRejectedError, match="262145 bytes long"):
        read_adapter(adapter)


def test_header_of_a_real_file(adapter: Path) -> None:
    data = (adapter / "adapter_model.safetensors").read_bytes()
    entries, start = read_header(data)
    assert {name: tensor.shape for name, tensor in entries.items()} == {"a": (2, 3), "b": (4,)}
    assert len(data) - start == 4 * (6 + 4)


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 2], 8, 12, "BF16")}


def test_header_with_metadata() -> None:
    entries, _ = read_header(packed({"__metadata__": {"format": "pt"}, **GOOD}, b"\0" * 12))
    assert sorted(entries) == ["a", "b"]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "is 0 bytes long"),
        (b"\0" * 7, "is 7 bytes long"),
        (struct.pack("<Q", 2**63) + b"{}", "claims a header of 9223372036854775808"),
        (struct.pack("<Q", MAX_HEADER_BYTES + 1) + b"{}", "claims a header"),
        (struct.pack("<Q", 100) + b"{}", "cut off inside its header"),
        (packed(b"not json"), "not valid JSON"),
        (packed(b"\xff\xfe\xff"), "not valid JSON"),
        (packed(b"[" * 200_000), "not valid JSON"),
        (packed([1, 2]), "not a JSON object"),
        (packed({}), "holds 0 tensors"),
        (packed({f"t{i}": 0 for i in range(MAX_TENSORS + 1)}), f"holds {MAX_TENSORS + 1} tensors"),
        (packed(b'{"a": 1, "a": 2}'), "appears twice"),
        (packed({"a": entry([2], 0, 8), "b": entry([1], 8, 12)}, b"\0" * 11), "11 bytes of data"),
        (packed({"a": entry([2], 0, 8)}, b"\0" * 9), "9 bytes of data"),
        (packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12), "overlapping"),
        (packed({"a": entry([2], 4, 12)}, b"\0" * 12), "behind a gap"),
        (packed({"a": entry([2], -8, 0)}), "overlapping"),
        (packed({"a": entry([2], 8, 0)}), "do not agree"),
        (packed({"a": entry([3], 0, 8)}, b"\0" * 8), "do not agree"),
        (packed({"a": entry([2**62, 4], 0, 0)}), "do not agree"),
        (packed({"a": entry([0], 0, 0)}), r"shape \[0\]"),
        (packed({"a": entry([-2, -1], 0, 8)}, b"\0" * 8), r"shape \[-2, -1\]"),
        (packed({"a": entry([2], 0, 16, "F64")}, b"\0" * 16), "dtype F64"),
        (packed({"a": entry([2], 0, 2, "F8_E4M3")}, b"\0" * 2), "dtype F8_E4M3"),
        (packed({"a": entry([2], 0, 2, "I8")}, b"\0" * 2), "dtype I8"),
        (packed({"a": {**entry([2], 0, 8), "strides": [1]}}, b"\0" * 8), "wrongly"),
        (packed({"a": {"dtype": "F32", "shape": [2]}}), "wrongly"),
        (packed({"a": entry([2], 0, 8) | {"shape": "2"}}), "wrongly"),
        (packed({"a": entry([10**4000] * 1900, 0, 4)}, b"0000"), "wrongly"),
        (packed({"a": entry([10**4000, 1], 0, 4)}, b"0000"), "wrongly"),
        (packed({"a": entry([1] * (MAX_DIMS + 1), 0, 4)}, b"0000"), "wrongly"),
        (packed({"a": entry([1], 0, 10**4000)}, b"0000"), "wrongly"),
        (packed({"a": [1]}), "wrongly"),
        (packed({"a\0b": entry([2], 0, 8)}, b"\0" * 8), "the name"),
        (packed({"x" * 513: entry([2], 0, 8)}, b"\0" * 8), "the name"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_corrupt_headers(data: bytes, problem: str) -> None:
    with pytest.raises(AdapterRejectedError, match=problem):
        read_header(data)


def test_no_cut_or_flip_of_a_file_gets_past_as_something_else(adapter: Path) -> None:
    """Every prefix is refused; every changed header byte is refused or still describes exactly the file's data."""
    data = (adapter / "adapter_model.safetensors").read_bytes()
    for length in range(len(data)):
        with pytest.raises(AdapterRejectedError):
            read_header(data[:length])
    _, start = read_header(data)
    for position in range(start):
        changed = bytearray(data)
        changed[position] ^= 0x01
        try:
            entries, data_start = read_header(changed)
        except AdapterRejectedError:
            continue
        assert max(tensor.data_offsets[1] for tensor in entries.values()) == len(data) - data_start
