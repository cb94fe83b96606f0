"""What the flags mean on a machine: model directory, device, dtype, limits; and the refusals before anything starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.config import Device, Dtype, ServerConfig
from manylora.runtime.errors import ConfigError, ModelNotFoundError, ModelUnsupportedError
from manylora.runtime.flags import config_from_kwargs
from manylora.runtime.model_config import parse_model_config
from manylora.runtime.prepare import check_roots, prepare, resolve_device, resolve_dtype, resolve_model

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def asked(model_dir: Path, **flags: Any) -> ServerConfig:
    return config_from_kwargs(model_path=str(model_dir), **({"device": "cpu"} | flags))


def test_everything_is_concrete(model_dir: Path) -> None:
    config = prepare(asked(model_dir, chunked_prefill_size=-1))
    assert config.model.model_dir == str(model_dir)
    assert config.model.tokenizer_path == str(model_dir)
    assert (config.model.device, config.model.dtype) == ("cpu", "float32")
    assert config.model.context_length == 512
    assert config.schedule.chunked_prefill_size == 512


def test_what_was_asked_stays(model_dir: Path, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    config = prepare(
        asked(
            model_dir,
            chunked_prefill_size=32,
            context_length=100,
            dtype="bfloat16",
            tokenizer_path=str(tokenizer),
        )
    )
    assert config.model.tokenizer_path == str(tokenizer)
    assert config.model.dtype == "bfloat16"
    assert config.model.context_length == 100
    assert config.schedule.chunked_prefill_size == 32


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"tp_size": 3}, r"--tp-size 3 does not divide the model's num_attention_heads \(4\)"),
        (
            {"context_length": 513},
            r"--context-length 513 exceeds the model's max_position_embeddings \(512\)",
        ),
        ({"tokenizer_path": "/no/such/place"}, "--tokenizer-path /no/such/place is not a directory"),
    ],
)
def test_what_does_not_fit_is_refused(model_dir: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        prepare(asked(model_dir, **flags))


def test_a_directory_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json does not exist"):
        prepare(asked(tmp_path))


def test_a_model_we_cannot_run_is_refused_by_name(model_dir: Path) -> None:
    (model_dir / "config.json").write_text(json.dumps({**LLAMA, "sliding_window": 128}))
    with pytest.raises(ModelUnsupportedError, match="sliding_window=128"):
        prepare(asked(model_dir))


@pytest.mark.parametrize("path", ["/no/such/model", "./model", "a/b/c"])
def test_what_looks_like_a_path_is_not_looked_up_elsewhere(path: str) -> None:
    with pytest.raises(ModelNotFoundError, match=f"--model-path {path} is not a directory"):
        resolve_model(path, ["*.json"], flag="model_path")


def test_a_hub_id_that_cannot_be_fetched_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline with an empty cache, as on a machine without a network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelNotFoundError) as caught:
        resolve_model("nobody/nothing", ["*.json"], flag="model_path")
    start = "--model-path nobody/nothing is neither a directory nor a model that could be fetched: "
    assert caught.value.message.startswith(start)
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("device", "tp_size", "num_gpus", "resolved"),
    [
        ("auto", 1, 0, "cpu"),
        ("auto", 2, 2, "cuda"),
        ("cuda", 1, 4, "cuda"),
        ("cpu", 4, 1, "cpu"),
        ("auto", 4, 0, "cpu"),
    ],
)
def test_the_device(device: Device, tp_size: int, num_gpus: int, resolved: Device) -> None:
    assert resolve_device(device, tp_size, num_gpus) == resolved


@pytest.mark.parametrize(
    ("device", "tp_size", "num_gpus", "message"),
    [
        ("cuda", 1, 0, "--device cuda: CUDA is missing"),
        ("auto", 4, 2, "--tp-size 4 needs 4 GPUs, CUDA shows 2"),
    ],
)
def test_gpus_that_are_not_there(device: Device, tp_size: int, num_gpus: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_device(device, tp_size, num_gpus)


@pytest.mark.parametrize(
    ("dtype", "device", "resolved"),
    [
        ("auto", "cuda", "bfloat16"),
        ("auto", "cpu", "float32"),
        ("float16", "cuda", "float16"),
        ("bfloat16", "cpu", "bfloat16"),
    ],
)
def test_the_dtype(dtype: Dtype, device: Device, resolved: Dtype) -> None:
    assert resolve_dtype(dtype, parse_model_config(LLAMA), device) == resolved


@pytest.mark.parametrize("root", ["", "nowhere", "file"])
def test_a_root_that_is_no_directory(root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    check_roots((str(tmp_path), "."))
    with pytest.raises(ConfigError, match=f"--adapter-root {root or repr('')} is not a directory"):
        check_roots((".", root))


def test_chat_template_of_the_operators(model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert prepare(asked(model_dir)).model.chat_template == ""
    (model_dir / "mine.jinja").write_text("{% generation %}{{ messages }}{% endgeneration %}")
    monkeypatch.chdir(model_dir)
    config = prepare(asked(model_dir, chat_template="mine.jinja"))
    assert config.model.chat_template == str(model_dir / "mine.jinja")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "--chat-template .* cannot be read: .*No such file"),
        (b"\xff", "--chat-template .* cannot be read: .*utf-8"),
        (b"{% if %}", "--chat-template .*: Expected an expression"),
    ],
)
def test_a_chat_template_that_is_none_ends_the_start(
    model_dir: Path, content: bytes | None, message: str
) -> None:
    file = model_dir / "mine.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=message) as caught:
        prepare(asked(model_dir, chat_template=str(file)))
    assert caught.value.param == "chat_template"
