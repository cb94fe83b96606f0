"""The tokenizer that these tests share."""

from pathlib import Path

import pytest

from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a byte-level tokenizer."""
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)
