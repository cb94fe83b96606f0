"""The tokenizer and its incremental decoder against the `tokenizers` library."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as TokenizerFile

from manylora.runtime.errors import (
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    ModelUnsupportedError,
)
from manylora.tokenizer_manager.incremental_decoder import IncrementalDecoder
from manylora.tokenizer_manager.tokenizer import BATCH_CHARACTERS, PIECE_CHARACTERS, Tokenizer
from tests.tokenizer_manager.tiny_tokenizer import BOS_ID, EOS_ID, EOT_ID, save_byte_level, save_sentencepiece

VOCAB_SIZE = 300
id_lists = st.lists(st.integers(0, VOCAB_SIZE + 5), max_size=40)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("byte-level"), VOCAB_SIZE)


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer(directory)


@pytest.fixture(scope="module")
def library(directory: Path) -> TokenizerFile:
    return TokenizerFile.from_file(str(directory / "tokenizer.json"))


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special_tokens: bool = True) -> list[str]:
    decoder = IncrementalDecoder(tokenizer.visible_pieces if skip_special_tokens else tokenizer.pieces)
    return [*(decoder.feed(token) for token in ids), decoder.flush()]


def test_encode_adds_bos(tokenizer: Tokenizer, library: TokenizerFile) -> None:
    [ids] = tokenizer.encode(["The capital of France is"])
    assert ids[0] == BOS_ID
    assert ids == library.encode("The capital of France is").ids
    assert tokenizer.decode(ids) == "The capital of France is"


@given(ids=id_lists, skip=st.booleans())
def test_decode_is_the_librarys(
    tokenizer: Tokenizer, library: TokenizerFile, ids: list[int], skip: bool
) -> None:
    known = [token for token in ids if token < tokenizer.vocab_size]
    expected = library.decode(known, skip_special_tokens=skip)
    assert tokenizer.decode(ids, skip_special_tokens=skip) == expected


@given(ids=id_lists, skip=st.booleans())
def test_stream_adds_up_to_the_full_decode(tokenizer: Tokenizer, ids: list[int], skip: bool) -> None:
    parts = stream(tokenizer, ids, skip_special_tokens=skip)
    assert "".join(parts) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(max_examples=50)
@given(text=st.text(alphabet="añé日本🙂👩‍👩‍👧\u0301 z", max_size=12))
def test_no_half_character_is_shown(tokenizer: Tokenizer, text: str) -> None:
    [ids] = tokenizer.encode([text])
    parts = stream(tokenizer, ids)
    assert "".join(parts) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in part for part in parts)


def test_characters_come_when_complete(tokenizer: Tokenizer) -> None:
    one_byte_each = [tokenizer.pieces.index(bytes([byte])) for byte in "é🙂".encode()]
    assert stream(tokenizer, one_byte_each) == ["", "é", "", "", "", "🙂", ""]
    assert stream(tokenizer, one_byte_each[:1]) == ["", "\N{REPLACEMENT CHARACTER}"]


def test_special_tokens_show_only_if_asked(tokenizer: Tokenizer) -> None:
    assert stream(tokenizer, [BOS_ID, EOS_ID, EOT_ID]) == ["", "", "", ""]
    shown = stream(tokenizer, [EOS_ID, EOT_ID], skip_special_tokens=False)
    assert shown == ["<|eos|>", "<|eot|>", ""]


def test_config_names_more_special_tokens(tmp_path: Path) -> None:
    named = Tokenizer(save_byte_level(tmp_path, pad_token={"content": "A", "special": True}))
    [index] = [i for i, piece in enumerate(named.pieces) if piece == b"A"]
    assert named.decode([index]) == ""
    assert named.decode([index], skip_special_tokens=False) == "A"


@pytest.mark.parametrize(
    ("options", "around"),
    [
        ({"add_bos_token": False}, ([], [])),
        ({"add_bos_token": True}, ([BOS_ID], [])),
        ({"add_bos_token": True, "add_eos_token": True}, ([BOS_ID], [EOS_ID])),
        ({}, ([BOS_ID], [])),
    ],
)
def test_add_bos_token_overrules_the_template(
    tmp_path: Path, options: dict[str, bool], around: tuple[list[int], list[int]]
) -> None:
    tokenizer = Tokenizer(save_byte_level(tmp_path, **options))
    [ids] = tokenizer.encode(["zz"])
    z = tokenizer.pieces.index(b"z")
    assert ids == [*around[0], z, z, *around[1]]


def test_sentencepiece_text_continues_the_prompt(tmp_path: Path) -> None:
    tokenizer = Tokenizer(save_sentencepiece(tmp_path))
    library = TokenizerFile.from_file(str(tmp_path / "tokenizer.json"))
    [ids] = tokenizer.encode(["a bé🙂"])
    assert tokenizer.pieces[ids[0]] == b"<s>"
    assert tokenizer.decode(ids) == " a bé🙂"  # the library strips the space a text begins with
    assert library.decode(ids) == "a bé🙂"
    assert "".join(stream(tokenizer, ids)) == " a bé🙂"
    assert stream(tokenizer, [tokenizer.pieces.index(b" Paris")]) == [" Paris", ""]


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequestError, match="Unicode"):
        tokenizer.encode(["\ud800"])


def test_a_long_batch_is_encoded_like_a_short_one(tokenizer: Tokenizer) -> None:
    text = "The capital of France is Paris. " * (PIECE_CHARACTERS // 24)  # more than one piece
    texts = [text] * (BATCH_CHARACTERS // len(text) + 1)
    [ids] = tokenizer.encode([text])
    assert tokenizer.encode_long(texts, max_tokens=len(ids)) == [ids] * len(texts)
    assert tokenizer.encode_long(["Paris", "a"], max_tokens=1) == tokenizer.encode(["Paris", "a"])


def test_a_text_far_too_long_is_not_encoded_to_its_end(tokenizer: Tokenizer) -> None:
    end_that_cannot_be_encoded = "\udc00"
    with pytest.raises(ContextLengthError, match="and more than 100 tokens"):
        tokenizer.encode_long(["a b " * BATCH_CHARACTERS + end_that_cannot_be_encoded], max_tokens=100)


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"tokenizer\.json does not exist"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelUnsupportedError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[")
    with pytest.raises(ModelUnsupportedError, match=r"tokenizer\.json cannot be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [None, {"type": "WordPiece", "prefix": "##", "cleanup": True}])
def test_unknown_decoder_is_refused(tmp_path: Path, decoder: dict[str, object] | None) -> None:
    save_byte_level(tmp_path)
    layout = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(layout | {"decoder": decoder}))
    with pytest.raises(ModelUnsupportedError, match=r"decoder (null|WordPiece), which is not implemented"):
        Tokenizer(tmp_path)


def test_the_front_never_loads_torch() -> None:
    code = (
        "import sys, manylora.runtime.front, manylora.runtime.engine; "
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == "[]"
