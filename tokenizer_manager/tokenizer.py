"""Text to token ids and back, from a model's `tokenizer.json`, without loading torch.

Encoding is the `tokenizers` library's. Decoding goes through `pieces`: the bytes each id stands for, found once, so
that streaming text is a table look-up and never depends on where a stream is cut. Generated text continues the prompt:
unlike a decode of the generated ids alone it keeps the space a SentencePiece word begins with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer as TokenizerFile
from tokenizers import processors

from manylora.runtime.errors import (
    BadRequestError,
    ContextLengthError,
    ModelNotFoundError,
    ModelUnsupportedError,
)

PieceOf = Callable[[str], bytes]

BATCH_CHARACTERS = 1 << 20  # so much text is encoded at once
PIECE_CHARACTERS = 1 << 16

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_NAMED_SPECIAL = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")


class Tokenizer:
    """One model's tokenizer. Thread-safe: nothing changes after construction.

    pieces: the bytes of each id; an id the tokenizer does not know is empty.
    visible_pieces: the same, special tokens empty (`skip_special_tokens`).
    special_tokens: the named ones (`bos_token`, …) as text.
    """

    def __init__(self, directory: str | Path) -> None:
        """Read `tokenizer.json` and `tokenizer_config.json` of a local directory.

        Raises ModelNotFoundError or ModelUnsupportedError.
        """
        path = Path(directory) / "tokenizer.json"
        layout = _read_json(path)
        config = _read_optional_json(Path(directory) / "tokenizer_config.json")
        special_map = _read_optional_json(Path(directory) / "special_tokens_map.json")
        self.special_tokens = named = _named_special_tokens({**special_map, **config})
        try:
            self._file = TokenizerFile.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ModelUnsupportedError(f"{path} cannot be read: {error}", param="tokenizer_path") from error
        self._file.no_truncation()
        self._file.no_padding()
        _apply_bos_eos(self._file, config, named)
        self.pieces = self._make_pieces(_piece_function(layout.get("decoder")))
        special = _special_ids(self._file, layout, config, named.values())
        self.visible_pieces = [b"" if i in special else piece for i, piece in enumerate(self.pieces)]

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""
        return len(self.pieces)

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """Ids of each text, with the special tokens the model's config says (usually a leading BOS) if wanted.

        Raises BadRequestError for a text that is not Unicode (a lone surrogate).
        """
        try:
            encodings = self._file.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
            return [encoding.ids for encoding in encodings]
        except (TypeError, UnicodeEncodeError) as error:
            raise BadRequestError("text is not valid Unicode", param="text") from error

    def encode_long(
        self, texts: Sequence[str], max_tokens: int, *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """`encode` in bounded memory: what the library makes of a text takes a hundred times the text's own.

        Raises ContextLengthError, without encoding the rest, for a text that is certainly longer than `max_tokens`.
        """
        if sum(map(len, texts)) <= BATCH_CHARACTERS:
            return self.encode(texts, add_special_tokens=add_special_tokens)
        id_lists: list[list[int]] = []
        for text in texts:
            self._check_length(text, max_tokens)
            id_lists += self.encode([text], add_special_tokens=add_special_tokens)
        return id_lists

    def _check_length(self, text: str, max_tokens: int) -> None:
        """Count in pieces. A cut adds a token or two, so only twice the limit is beyond doubt."""
        count = 0
        for start in range(0, len(text), PIECE_CHARACTERS):
            count += len(self.encode([text[start : start + PIECE_CHARACTERS]])[0])
            if count > 2 * max_tokens:
                raise ContextLengthError(
                    f"The prompt has {len(text)} characters and more than {max_tokens} tokens, the model's context.",
                    param="text",
                )

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of generated ids; bytes that are not UTF-8 become U+FFFD."""
        pieces = self.visible_pieces if skip_special_tokens else self.pieces
        known = len(pieces)
        return b"".join(pieces[i] for i in ids if i < known).decode("utf-8", "replace")

    def _make_pieces(self, piece_of: PieceOf) -> list[bytes]:
        vocab = self._file.get_vocab(with_added_tokens=True)
        pieces = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, index in vocab.items():
            pieces[index] = piece_of(token)
        return pieces


def _apply_bos_eos(file: TokenizerFile, config: dict[str, Any], named: dict[str, str]) -> None:
    """`add_bos_token`/`add_eos_token` of tokenizer_config.json overrule tokenizer.json's template, as in transformers."""
    if "add_bos_token" not in config and "add_eos_token" not in config:
        return
    before = named.get("bos_token") if config.get("add_bos_token") else None
    after = named.get("eos_token") if config.get("add_eos_token") else None
    template = " ".join([*([before] if before else []), "$A", *([after] if after else [])])
    ids = {token: file.token_to_id(token) for token in (before, after) if token}
    for token, index in ids.items():
        if index is None:
            raise ModelUnsupportedError(
                f"the tokenizer adds {token!r}, which its vocabulary lacks", param="tokenizer_path"
            )
    # An explicit pair template: the library refuses a post-processor without one.
    file.post_processor = processors.TemplateProcessing(
        single=template, pair=f"{template} $B:1", special_tokens=list(ids.items())
    )


def _piece_function(decoder: dict[str, Any] | None) -> PieceOf:
    """What one token string contributes to the text, by tokenizer.json's `decoder`."""
    steps: list[dict[str, Any]] = []
    if decoder is not None:
        steps = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    kinds = [str(step["type"]) for step in steps]
    if kinds == ["ByteLevel"]:
        return _byte_level_piece
    replacements: list[tuple[str, str]] = []
    for step, kind in zip(steps, kinds, strict=True):
        if kind == "Replace" and "String" in step["pattern"]:
            replacements.append((step["pattern"]["String"], step["content"]))
        elif kind == "Metaspace":
            replacements.append((step["replacement"], " "))
        elif kind not in (
            "ByteFallback",
            "Fuse",
            "Strip",
        ):  # Strip: only of a text's start, where ours never is
            replacements.clear()
            break
    if not replacements:
        raise ModelUnsupportedError(
            f"tokenizer.json has the decoder {' + '.join(kinds) or 'null'}, which is not implemented",
            param="tokenizer_path",
        )
    return _sentencepiece_piece(replacements, byte_fallback="ByteFallback" in kinds)


def _sentencepiece_piece(replacements: list[tuple[str, str]], *, byte_fallback: bool) -> PieceOf:
    def piece_of(token: str) -> bytes:
        if byte_fallback and (match := _BYTE_TOKEN.match(token)):
            return bytes([int(match[1], 16)])
        for old, new in replacements:
            token = token.replace(old, new)
        return token.encode()

    return piece_of


def _byte_level_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTE_OF = _byte_level_alphabet()


def _byte_level_piece(token: str) -> bytes:
    try:
        return bytes(_BYTE_OF[char] for char in token)
    except KeyError:  # an added token, written as it reads
        return token.encode()


def _named_special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """`bos_token` and the like, each a string or an object with `content`."""
    named: dict[str, str] = {}
    for key in _NAMED_SPECIAL:
        value = config.get(key)
        content = cast("dict[str, Any]", value).get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            named[key] = content
    return named


def _special_ids(
    file: TokenizerFile, layout: dict[str, Any], config: dict[str, Any], named: Iterable[str]
) -> set[int]:
    special = {int(token["id"]) for token in layout.get("added_tokens") or () if token.get("special")}
    added: dict[str, dict[str, Any]] = config.get("added_tokens_decoder") or {}
    special |= {int(index) for index, token in added.items() if token.get("special")}
    return special | {index for token in named if (index := file.token_to_id(token)) is not None}


def _read_optional_json(path: Path) -> dict[str, Any]:
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelNotFoundError(
            f"{path} does not exist; a model needs a tokenizer.json", param="tokenizer_path"
        ) from error
    except (OSError, ValueError) as error:
        raise ModelUnsupportedError(f"{path} cannot be read: {error}", param="tokenizer_path") from error
    if not isinstance(value, dict):
        raise ModelUnsupportedError(f"{path} is not a JSON object", param="tokenizer_path")
    return cast("dict[str, Any]", value)
