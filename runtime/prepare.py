"""The short-lived process that finds out what the flags mean on this machine, before anything big starts.

It resolves hub ids to directories (downloading with progress bars), `auto` to a device and a dtype, -1 to a number, and
refuses what cannot work. It is a process of its own so that a stop never waits for a download.
"""

from __future__ import annotations

import ctypes
import importlib.util
import runpy
import sys
from pathlib import Path

import msgspec

from manylora.runtime.child import ChildContext, run_child
from manylora.runtime.config import Device, Dtype, ModelArgs, ServerConfig
from manylora.runtime.errors import ConfigError, ModelNotFoundError
from manylora.runtime.messages import Prepared
from manylora.runtime.model_config import ModelConfig, load_model_config

_TOKENIZER_FILES = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHT_FILES = ["*.safetensors"]
_OTHER_FORMATS = ["original/*", "consolidated*"]  # the same weights again, in files we do not read


def prepare(config: ServerConfig) -> ServerConfig:
    """`config` with model and tokenizer directories, device, dtype, context length and step size concrete.

    Raises ConfigError or one of its subclasses.
    """
    args = config.model
    check_roots(config.access.adapter_root)
    weights = [] if args.load_format == "dummy" else _WEIGHT_FILES
    model_dir = resolve_model(args.model_path, _TOKENIZER_FILES + weights, flag="model_path")
    tokenizer_dir = model_dir
    if args.tokenizer_path:
        tokenizer_dir = resolve_model(args.tokenizer_path, _TOKENIZER_FILES, flag="tokenizer_path")
    model = load_model_config(model_dir)
    model.check_tp(config.parallel.tp_size)
    device = resolve_device(args.device, config.parallel.tp_size, cuda_device_count())
    context_length = _context_length(args, model)
    chunk = config.schedule.chunked_prefill_size
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(
            args,
            model_dir=model_dir,
            tokenizer_path=tokenizer_dir,
            device=device,
            dtype=resolve_dtype(args.dtype, model, device),
            chat_template=check_chat_template(args.chat_template),
            context_length=context_length,
        ),
        schedule=msgspec.structs.replace(
            config.schedule, chunked_prefill_size=context_length if chunk == -1 else chunk
        ),
    )


def resolve_model(path: str, patterns: list[str], *, flag: str) -> str:
    """The directory of a model: `path` itself, or its files of the hub that match `patterns`, downloaded if need be."""
    option = "--" + flag.replace("_", "-")
    if Path(path).is_dir():
        return str(Path(path).resolve())
    if path.startswith(("/", ".", "~")) or path.count("/") > 1:
        raise ModelNotFoundError(f"{option} {path} is not a directory", param=flag)
    import huggingface_hub  # only a hub id pays for it

    try:
        return huggingface_hub.snapshot_download(  # pyright: ignore[reportUnknownMemberType]
            path, allow_patterns=patterns, ignore_patterns=_OTHER_FORMATS
        )
    except Exception as error:  # whatever the library raises, the user is owed one line
        reason = " ".join(str(error).split())
        raise ModelNotFoundError(
            f"{option} {path} is neither a directory nor a model that could be fetched: {reason}", param=flag
        ) from error


def check_roots(roots: tuple[str, ...]) -> None:
    """ConfigError unless every --adapter-root is a directory: a wrong one would only be noticed by its refusals."""
    for root in roots:
        if not Path(root).is_dir() or not root:
            raise ConfigError(f"--adapter-root {root or repr(root)} is not a directory", param="adapter_root")


def resolve_device(asked: Device, tp_size: int, num_gpus: int) -> Device:
    """ "cuda" or "cpu"; ConfigError when the GPUs do not suffice."""
    if asked == "cpu" or (asked == "auto" and num_gpus == 0):
        return "cpu"
    if num_gpus == 0:
        raise ConfigError(
            "--device cuda: CUDA is missing (no driver, no GPU, or a PyTorch built without it)",
            param="device",
        )
    if tp_size > num_gpus:
        raise ConfigError(f"--tp-size {tp_size} needs {tp_size} GPUs, CUDA shows {num_gpus}", param="tp_size")
    return "cuda"


def resolve_dtype(asked: Dtype, model: ModelConfig, device: Device) -> Dtype:
    """`auto` is the checkpoint's dtype on a GPU; on a CPU float32, where half precision is slow and gains nothing."""
    if asked != "auto":
        return asked
    return "float32" if device == "cpu" else msgspec.convert(model.dtype, Dtype)


def check_chat_template(path: str) -> str:
    """The absolute path of `--chat-template`, "" if it was not given; ConfigError if the file is no template."""
    if not path:
        return ""
    from jinja2 import TemplateError  # only a template of its own pays for it

    from manylora.tokenizer_manager.template_process import compile_template

    file = Path(path).resolve()
    try:
        compile_template(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--chat-template {path} cannot be read: {error}", param="chat_template") from error
    except TemplateError as error:
        raise ConfigError(f"--chat-template {path}: {error}", param="chat_template") from error
    return str(file)


def cuda_device_count() -> int:
    """GPUs that PyTorch could use, found without importing it. Heeds CUDA_VISIBLE_DEVICES, as the driver does."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return 0
    if runpy.run_path(str(Path(torch.origin).with_name("version.py")))["cuda"] is None:
        return 0
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def _context_length(args: ModelArgs, model: ModelConfig) -> int:
    longest = model.max_position_embeddings
    if args.context_length is not None and args.context_length > longest:
        raise ConfigError(
            f"--context-length {args.context_length} exceeds the model's max_position_embeddings ({longest})",
            param="context_length",
        )
    return args.context_length or longest


def main(config: ServerConfig, context: ChildContext) -> None:
    context.supervisor.send(Prepared(prepare(config)))


if __name__ == "__main__":
    run_child("prepare", sys.argv[1:], main)
