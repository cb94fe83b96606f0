"""Small tokenizers as a model directory holds them: byte-level BPE with a BOS template, and SentencePiece style."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

BOS, EOS, EOT = "<|bos|>", "<|eos|>", "<|eot|>"
BOS_ID, EOS_ID, EOT_ID = 0, 1, 2
CORPUS = (
    "List 3 countries and their capitals. The capital of France is Paris.",
    "Japan, Tokyo. Brasil, Brasília. 日本の首都は東京です。 🙂 naïve café",
)


def save_byte_level(directory: Path, vocab_size: int = 300, **config: Any) -> Path:
    """Byte-level BPE. `config`: more of tokenizer_config.json."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, BOS_ID)]
    )
    return _save(tokenizer, directory, {"bos_token": BOS, "eos_token": EOS, **config})


def save_sentencepiece(directory: Path) -> Path:
    """A Llama-2 style vocabulary: words with a leading ▁, single letters, and every byte as a fallback."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += ["▁", "▁Paris", "▁is", "▁the", "é", *"abcdefghijklmnopqrstuvwxyz"]
    vocab = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return _save(tokenizer, directory, {"bos_token": "<s>", "add_bos_token": True})


def _save(tokenizer: Tokenizer, directory: Path, config: dict[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
