"""Every flag of the server, once: the command line and `Engine(...)` keyword arguments share this table and its checks.

A flag `--some-name` is the keyword `some_name`. Its type and default are those of the config field it sets.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, NoReturn, get_args, get_origin

import msgspec

from manylora.runtime.config import (
    AccessArgs,
    CacheArgs,
    HttpArgs,
    LoRAArgs,
    ModelArgs,
    ParallelArgs,
    ScheduleArgs,
    ServerConfig,
)
from manylora.runtime.errors import ConfigError
from manylora.runtime.lora_flags import parse_lora_paths, parse_target_modules

LORA_BACKENDS = ("triton",)
LOG_LEVELS = ("debug", "info", "warning", "error", "critical")
_SECTIONS: dict[str, type[msgspec.Struct]] = {
    "model": ModelArgs,
    "lora": LoRAArgs,
    "cache": CacheArgs,
    "schedule": ScheduleArgs,
    "parallel": ParallelArgs,
    "http": HttpArgs,
    "access": AccessArgs,
    "": ServerConfig,
}
_DTYPE_ALIASES = {"half": "float16", "float": "float32"}


class Flag(NamedTuple):
    """One flag. `field` is the field of `section` it sets where that is not its own name; bounds are inclusive."""

    name: str
    section: str
    help: str
    field: str = ""
    low: float = -math.inf
    high: float = math.inf
    aliases: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def target(self) -> msgspec.structs.FieldInfo:
        wanted = self.field or self.name
        return next(f for f in msgspec.structs.fields(_SECTIONS[self.section]) if f.name == wanted)


FLAGS = (
    Flag(
        "model_path",
        "model",
        "directory in Hugging Face format, or a hub id (required)",
        aliases=("--model",),
    ),
    Flag("tokenizer_path", "model", "directory or hub id of the tokenizer; default: the model's"),
    Flag("served_model_name", "model", "name of the base model in /v1/models; default: the model path"),
    Flag(
        "chat_template", "model", "file with the template of /v1/chat/completions; default: the tokenizer's"
    ),
    Flag("load_format", "model", "dummy: random weights of the model's shapes, nothing is read"),
    Flag("dtype", "model", "of weights and KV; auto: the checkpoint's, float32 on CPU"),
    Flag("device", "model", "auto: cuda if there is one"),
    Flag("context_length", "model", "longest prompt and answer together; default: the model's", low=1),
    Flag("random_seed", "model", "seed of requests that bring none", low=0, high=2**63 - 1),
    Flag("tp_size", "parallel", "tensor-parallel workers, one per GPU", low=1, aliases=("--tp",)),
    Flag("host", "http", "address to listen on"),
    Flag("port", "http", "0: any free port", low=0, high=65535),
    Flag(
        "api_key_file", "access", "file with a key per line; one of them, or an admin key, opens the server"
    ),
    Flag("admin_key_file", "access", "file with a key per line; only these open the admin's routes"),
    Flag("insecure", "access", "listen on a public address without --api-key-file"),
    Flag("adapter_root", "access", "directory below which adapters may be loaded over HTTP; repeatable"),
    Flag("allow_hub", "access", "adapters may be loaded from the hub over HTTP"),
    Flag("enable_lora", "lora", "serve adapters; implied by --lora-paths"),
    Flag(
        "lora_paths",
        "lora",
        'adapters loaded at start, each PATH, NAME=PATH or {"lora_name":NAME,"lora_path":PATH,"pinned":true}',
    ),
    Flag("max_loras_per_batch", "lora", "most distinct adapters in one step", low=1),
    Flag("max_loaded_loras", "lora", "most adapters with a copy in host memory", low=1),
    Flag("lora_backend", "lora", "kernels of the adapters", choices=LORA_BACKENDS),
    Flag("max_lora_rank", "lora", "refuse adapters of a higher rank; default: any rank", low=1),
    Flag(
        "lora_target_modules",
        "lora",
        "refuse adapters of other modules; default and `all`: every supported module",
        field="target_modules",
    ),
    Flag("lora_sharding", "lora", "how adapters are cut across workers", field="sharding"),
    Flag("page_size", "cache", "tokens in a page of the memory pool", low=1),
    Flag("mem_fraction_static", "cache", "of the GPU's memory, for weights and the pool", low=0.01, high=1),
    Flag("max_total_tokens", "cache", "most tokens whose KV the pool holds", low=1),
    Flag("disable_radix_cache", "cache", "share no prefix between requests"),
    Flag("host_fraction", "cache", "of the machine's free memory, for adapters' host copies", low=0, high=1),
    Flag("max_running_requests", "schedule", "most sequences in one step", low=1),
    Flag("max_queued_requests", "schedule", "most sequences that wait; beyond it a call gets 503", low=1),
    Flag("chunked_prefill_size", "schedule", "most tokens in one step; -1: the context length", low=-1),
    Flag("disable_overlap_schedule", "schedule", "plan a step only after the one before has answered"),
    Flag(
        "cuda_graph_max_bs",
        "schedule",
        "largest decode step that is captured whole as a CUDA graph; 0: no graphs",
        low=0,
    ),
    Flag("log_level", "", "of the log on stderr", choices=LOG_LEVELS),
    Flag("log_format", "", "json: each line of stderr is one JSON object"),
)


class _Parser(argparse.ArgumentParser):
    """Raises ConfigError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def make_parser(prog: str) -> argparse.ArgumentParser:
    """The parser of `manylora serve`. It collects strings; `config_from_kwargs` gives them their types."""
    parser = _Parser(
        prog=prog,
        description="Serve one base model and any number of LoRA adapters over HTTP.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    for flag in FLAGS:
        options: dict[str, Any] = {"dest": flag.name, "help": _help(flag)}
        if flag.target.type is bool:
            options["action"] = "store_true"
        elif flag.name == "adapter_root":
            options |= {"action": "append", "metavar": "DIRECTORY"}
        elif flag.name in ("lora_paths", "lora_target_modules"):
            options |= {"nargs": "*", "metavar": flag.name.upper().removesuffix("S")}
        else:
            options["metavar"] = "{" + ",".join(_choices(flag)) + "}" if _choices(flag) else flag.name.upper()
        parser.add_argument(flag.option, *flag.aliases, **options)
    return parser


def parse_flags(argv: Sequence[str], prog: str = "manylora serve") -> ServerConfig:
    """The config a command line asks for. Raises ConfigError with one line that names the flag."""
    config = _make_config(vars(make_parser(prog).parse_args(argv)), strict=False)
    check_exposure(config)
    return config


def check_exposure(config: ServerConfig) -> None:
    """Raise ConfigError if others than this machine could use the server without a key and nobody has said so."""
    access, host = config.access, config.http.host
    if not (config.http.is_loopback or access.api_key_file is not None or access.insecure):
        raise ConfigError(
            f"--host {host or repr(host)} may be reached from other machines: give --api-key-file, or --insecure to "
            "serve without keys",
            param="host",
        )


def config_from_kwargs(**flags: Any) -> ServerConfig:
    """The config of keyword arguments named as the flags. `lora_paths` may also be a dict name -> path.

    Raises ConfigError as `parse_flags` does.
    """
    return _make_config(flags, strict=True)


def _make_config(given: dict[str, Any], *, strict: bool) -> ServerConfig:
    known = {flag.name: flag for flag in FLAGS}
    parts: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    for name, value in given.items():
        if name not in known:
            raise ConfigError(f"there is no flag {name!r}", param=name)
        flag = known[name]
        parts[flag.section][flag.target.name] = _convert(flag, value, strict)
    if not parts["model"].get("model_path"):
        raise ConfigError("--model-path is required", param="model_path")
    lora = parts["lora"]
    if lora.get("lora_paths"):
        if given.get("enable_lora") is False:
            raise ConfigError("--lora-paths needs --enable-lora", param="lora_paths")
        lora["enable_lora"] = True
    config = ServerConfig(
        model=ModelArgs(**parts["model"]),
        lora=LoRAArgs(**lora),
        cache=CacheArgs(**parts["cache"]),
        schedule=ScheduleArgs(**parts["schedule"]),
        parallel=ParallelArgs(**parts["parallel"]),
        http=HttpArgs(**parts["http"]),
        access=AccessArgs(**parts["access"]),
        **parts[""],
    )
    _check(config)
    return config


def _convert(flag: Flag, value: Any, strict: bool) -> Any:
    """One flag's value in its field's type, or ConfigError. `strict` is false for strings of a command line."""
    if flag.name == "lora_paths":
        return parse_lora_paths(value)
    if flag.name == "lora_target_modules":
        return parse_target_modules(value)
    if flag.name == "adapter_root" and isinstance(value, str):
        value = [value]
    if flag.name == "dtype":
        value = _DTYPE_ALIASES.get(value, value)
    choices = _choices(flag)
    if choices and value not in choices:
        raise ConfigError(
            f"{flag.option} must be one of {', '.join(choices)}, got {value!r}", param=flag.name
        )
    try:
        typed = msgspec.convert(value, flag.target.type, strict=strict)
    except msgspec.ValidationError as error:
        kind = _type_name(flag)
        raise ConfigError(f"{flag.option} must be {kind}, got {value!r}", param=flag.name) from error
    if isinstance(typed, (int, float)) and not flag.low <= typed <= flag.high:
        limit = f"at least {flag.low:g}" if math.isinf(flag.high) else f"in [{flag.low:g}, {flag.high:g}]"
        raise ConfigError(f"{flag.option} must be {limit}, got {value}", param=flag.name)
    return typed


def _check(config: ServerConfig) -> None:
    """What flags demand of each other."""
    lora, schedule = config.lora, config.schedule
    if schedule.chunked_prefill_size == 0:
        raise ConfigError(
            "--chunked-prefill-size must be -1 or at least 1, got 0", param="chunked_prefill_size"
        )
    if lora.max_loaded_loras is not None:
        if lora.max_loaded_loras < lora.max_loras_per_batch:
            raise ConfigError(
                f"--max-loaded-loras ({lora.max_loaded_loras}) must be at least "
                f"--max-loras-per-batch ({lora.max_loras_per_batch})",
                param="max_loaded_loras",
            )
        if lora.max_loaded_loras < len(lora.lora_paths):
            raise ConfigError(
                f"--max-loaded-loras ({lora.max_loaded_loras}) must be at least the number of "
                f"--lora-paths ({len(lora.lora_paths)})",
                param="max_loaded_loras",
            )
    pinned = sum(path.pinned for path in lora.lora_paths)
    if pinned > lora.max_loras_per_batch - 1:
        raise ConfigError(
            f"--lora-paths pins {pinned} adapters; at most --max-loras-per-batch - 1 "
            f"({lora.max_loras_per_batch - 1}) may be pinned, so that the others are not starved",
            param="lora_paths",
        )


def _choices(flag: Flag) -> tuple[str, ...]:
    if flag.choices or get_origin(flag.target.type) is not Literal:
        return flag.choices
    return get_args(flag.target.type)


def _type_name(flag: Flag) -> str:
    types = get_args(flag.target.type) or (flag.target.type,)
    names = {int: "an integer", float: "a number", str: "text", bool: "true or false"}
    return next(names[kind] for kind in types if kind in names)


def _help(flag: Flag) -> str:
    default = flag.target.default
    if default in (msgspec.NODEFAULT, None, "", (), False):
        return flag.help
    return f"{flag.help} (default: {default})".replace("%", "%%")
