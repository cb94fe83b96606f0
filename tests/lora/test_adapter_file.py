"""Finding and reading an adapter's files, and everything a safetensors file can have wrong."""

import hashlib
import io
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from manylora.lora.adapter_file import hub_revision, open_adapter, resolve_adapter
from manylora.lora.safetensors_header import (
    MAX_DIMS,
    MAX_HEADER_BYTES,
    MAX_TENSORS,
    TensorEntry,
    read_header,
)
from manylora.runtime.adapter_access import Permit
from manylora.runtime.errors import AdapterPathForbiddenError, AdapterRejectedError
from tests.lora.adapters import write_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "adapter", {"a": torch.ones(2, 3), "b": torch.ones(4)})


def packed(fields: Any, data: bytes = b"") -> bytes:
    text = fields if isinstance(fields, bytes) else json.dumps(fields).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(shape: list[int], begin: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def test_a_directory_is_itself(adapter: Path) -> None:
    assert resolve_adapter(Permit(str(adapter))) == adapter


@pytest.mark.parametrize(
    ("directory", "is_snapshot"),
    [
        ("/c/hub/models--org--name/snapshots/{}", True),
        ("/c/hub/models--org--name/snapshots/{}/deeper", False),
        ("/c/hub/models--org--name/snapshots/main", False),
        ("/home/snapshots/{}", False),
    ],
)
def test_a_snapshot_of_the_hub_has_a_revision(directory: str, is_snapshot: bool) -> None:
    commit = "0123456789" * 4
    assert hub_revision(Path(directory.format(commit))) == (commit if is_snapshot else "")


@pytest.mark.parametrize("lora_path", ["/nowhere/at/all", "./nowhere", "a/b/c", "http://host/x"])
def test_a_path_that_is_no_hub_id_is_not_looked_up(
    lora_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AdapterRejectedError, match="no adapter directory /"):
        resolve_adapter(Permit(lora_path))


@pytest.mark.parametrize("lora_path", ["~nobody-of-that-name/adapter", "/" + "long" * 1000])
def test_a_path_that_cannot_be_looked_up(lora_path: str) -> None:
    with pytest.raises(AdapterRejectedError, match="cannot be looked up"):
        resolve_adapter(Permit(lora_path))


def test_an_unknown_hub_id_says_where_was_looked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(AdapterRejectedError, match=r"someone/some-adapter is neither a directory \(/.*hub"):
        resolve_adapter(Permit("someone/some-adapter"))


def test_a_hub_id_is_one_even_where_a_directory_is_called_so(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(adapter.parent)
    assert resolve_adapter(Permit("adapter")) == Path("adapter")
    with pytest.raises(
        AdapterRejectedError, match="adapter is not an adapter that could be fetched from the hub"
    ):
        resolve_adapter(Permit("adapter", hub_only=True))


def test_a_file_is_not_a_directory(adapter: Path) -> None:
    with pytest.raises(AdapterRejectedError, match="give the directory"):
        resolve_adapter(Permit(str(adapter / "adapter_config.json")))


def digest(directory: Path) -> str:
    with open_adapter(directory) as file:
        return file.digest()


def header(data: bytes | bytearray) -> dict[str, TensorEntry]:
    return read_header(io.BytesIO(data).read, len(data))


def test_the_digest_is_of_both_files(adapter: Path) -> None:
    config, weights = (adapter / CONFIG).read_bytes(), (adapter / WEIGHTS).read_bytes()
    expected = hashlib.sha256(len(config).to_bytes(8, "little") + config + weights).hexdigest()
    assert digest(adapter) == expected
    with open_adapter(adapter) as file:
        assert (file.config, file.size) == (config, len(weights))
        rest = bytearray(len(weights) - 9)
        assert file.read(9) == weights[:9]
        file.read_into(memoryview(rest))
        assert rest == weights[9:]
        assert file.digest() == expected
    seen = {expected}
    for name in (CONFIG, WEIGHTS):
        with (adapter / name).open("ab") as file:
            file.write(b" ")
        seen.add(digest(adapter))
    assert len(seen) == 3


def test_the_digest_is_of_what_was_read(adapter: Path) -> None:
    """The file changes in the middle: what was read before counts as it was."""
    path = adapter / WEIGHTS
    config, weights = (adapter / CONFIG).read_bytes(), path.read_bytes()
    with open_adapter(adapter) as file:
        assert file.read(10) == weights[:10]
        with path.open("r+b") as writer:
            writer.write(b"\xff" * len(weights) + b"more")
        mixed = weights[:10] + b"\xff" * (len(weights) - 10)
        assert file.digest() == hashlib.sha256(len(config).to_bytes(8, "little") + config + mixed).hexdigest()


def test_a_file_that_becomes_shorter(adapter: Path) -> None:
    with open_adapter(adapter) as file:
        file.read(10)
        os.truncate(adapter / WEIGHTS, 30)
        with pytest.raises(AdapterRejectedError, match="became shorter while it was read"):
            file.read(file.size - 10)
        with pytest.raises(AdapterRejectedError, match="became shorter while it was read"):
            file.digest()


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_missing_file_is_named(adapter: Path, name: str) -> None:
    (adapter / name).unlink()
    with pytest.raises(AdapterRejectedError, match=f"there is no .*{name}"):
        open_adapter(adapter)


def test_pickled_weights_are_refused_by_name(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(AdapterRejectedError, match=r"only adapter_model\.bin, a pickle"):
        open_adapter(adapter)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["fifo", "directory"])
def test_only_regular_files_are_read(adapter: Path, make: Callable[[Path], None]) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    make(adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterRejectedError, match=r"is not a regular file|: Is a directory"):
        open_adapter(adapter)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_file_that_lies_outside_of_the_root_is_not_read(adapter: Path, tmp_path: Path, name: str) -> None:
    """Whether there is one or not; a link that stays inside is followed."""
    file, outside = adapter / name, tmp_path / "outside"
    with open_adapter(adapter, str(adapter)) as opened:
        assert opened.size
    file.rename(outside)
    file.symlink_to(outside)
    with open_adapter(adapter, str(tmp_path)) as opened:
        assert opened.size
    for _ in range(2):
        with pytest.raises(AdapterPathForbiddenError, match="leads out of --adapter-root"):
            open_adapter(adapter, str(adapter))
        outside.unlink(missing_ok=True)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_link_put_in_after_the_check_leads_nowhere(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / name).write_bytes((adapter / name).read_bytes())
    really_open = os.open

    def swap_and_open(path: str, flags: int) -> int:
        if os.path.basename(path) == name:
            os.unlink(path)
            os.symlink(tmp_path / name, path)
        return really_open(path, flags)

    monkeypatch.setattr("manylora.lora.adapter_file._open_nonblocking", swap_and_open)
    with pytest.raises(AdapterPathForbiddenError, match="leads out of --adapter-root"):
        open_adapter(adapter, str(adapter))


def test_a_long_config_is_not_read(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_bytes(b" " * (256 * 1024 + 1))
    with pytest.raises(AdapterRejectedError, match="262145 bytes long"):
        open_adapter(adapter)


def test_header_of_a_real_file(adapter: Path) -> None:
    data = (adapter / "adapter_model.safetensors").read_bytes()
    stream = io.BytesIO(data)
    entries = read_header(stream.read, len(data))
    assert {name: tensor.shape for name, tensor in entries.items()} == {"a": (2, 3), "b": (4,)}
    assert len(data) - stream.tell() == 4 * (6 + 4)


GOOD = {"a": entry([2], 0, 8), "b": entry([1, 2], 8, 12, "BF16")}


def test_header_with_metadata() -> None:
    entries = header(packed({"__metadata__": {"format": "pt"}, **GOOD}, b"\0" * 12))
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
        header(data)


def test_no_cut_or_flip_of_a_file_gets_past_as_something_else(adapter: Path) -> None:
    """Every prefix is refused; every changed header byte is refused or still describes exactly the file's data."""
    data = (adapter / "adapter_model.safetensors").read_bytes()
    for length in range(len(data)):
        with pytest.raises(AdapterRejectedError):
            header(data[:length])
    for position in range(len(data) - 4 * (6 + 4)):
        changed = bytearray(data)
        changed[position] ^= 0x01
        try:
            entries = header(changed)
        except AdapterRejectedError:
            continue
        assert max(tensor.data_offsets[1] for tensor in entries.values()) == 4 * (6 + 4)
