"""PEFT's adapter_config.json as a typed value; whatever would change the answer and is not implemented is refused.

Every field of PEFT's LoraConfig is named below: read, without effect on inference, or refused unless it has its neutral
value. So is a field that nobody here has heard of. Pure; nothing in the file is evaluated.
"""

from __future__ import annotations

import math
import re
from functools import cached_property
from typing import Any, TypeVar

import msgspec

from manylora.runtime.errors import AdapterRejectedError

T = TypeVar("T")

CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 256 * 1024

# Without effect on what a trained adapter adds. Which modules have one is decided by the tensors in the file.
IGNORED_FIELDS = frozenset(
    (
        "auto_mapping",
        "base_model_name_or_path",
        "corda_config",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
        "task_type",
    )
)
# Field -> the values that leave a plain LoRA; any other is refused by the field's name.
NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (None,),
    "arrow_config": (None,),
    "bias": ("none",),
    "ensure_weight_tying": (None, False),
    "fan_in_fan_out": (None, False),
    "kasa_config": (None,),
    "layer_replication": (None, []),
    "lora_bias": (None, False),
    "megatron_config": (None,),
    "modules_to_save": (None, []),
    "monteclora_config": (None,),
    "peft_type": ("LORA",),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_bdlora": (None, False),
    "use_dora": (None, False),
    "use_qalora": (None, False),
    "velora_config": (None,),
}
# Initialisations that leave the base model as it is. The others (pissa, olora, corda, loftq, lora_ga) train against
# changed base weights, which the adapter's file does not bring along.
KEPT_BASE_INITS = (True, False, "gaussian", "eva", "orthogonal", "mica")

_PATTERN_KEY = re.compile(r"\^?(?:[A-Za-z0-9_.\-]|\\\.)+\$?")
_MAX_PATTERN_KEY = 512
_FLOAT32_MAX = 3.4028234663852886e38


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True, dict=True):
    """What decides rank and scaling of each module. `module` is its full name in the base model."""

    r: int
    lora_alpha: float
    use_rslora: bool = False
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    target_modules: list[str] | str = []
    init_lora_weights: bool | str = True

    def rank(self, module: str) -> int:
        return _first_match(self._rank_rules, module, self.r)

    def scaling(self, module: str) -> float:
        alpha, rank = _first_match(self._alpha_rules, module, self.lora_alpha), self.rank(module)
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    @cached_property
    def _rank_rules(self) -> list[tuple[re.Pattern[str], int]]:
        return _compile(self.rank_pattern)

    @cached_property
    def _alpha_rules(self) -> list[tuple[re.Pattern[str], float]]:
        return _compile(self.alpha_pattern)


READ_FIELDS = frozenset(AdapterConfig.__struct_fields__)


def parse_adapter_config(data: bytes) -> AdapterConfig:
    """Raises AdapterRejectedError naming the field and its value."""
    if len(data) > MAX_CONFIG_BYTES:
        raise _rejected(f"is {len(data)} bytes long; at most {MAX_CONFIG_BYTES} are read")
    try:
        fields = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise _rejected(f"is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise _rejected("is not a JSON object")
    _refuse_unimplemented(fields)
    given = {name: fields[name] for name in READ_FIELDS & fields.keys() if fields[name] is not None}
    try:
        config = msgspec.convert(given, AdapterConfig)
    except msgspec.ValidationError as error:
        raise _rejected(f"is malformed: {error}") from error
    _check_values(config)
    return config


def _refuse_unimplemented(fields: dict[str, Any]) -> None:
    if "peft_type" not in fields:
        raise _rejected("has no peft_type: it is not a PEFT adapter", "peft_type")
    for name, value in fields.items():
        if name in READ_FIELDS or name in IGNORED_FIELDS:
            continue
        neutral = NEUTRAL_VALUES.get(name, (None, False, [], {}, ""))
        if not any(value == other and type(value) is type(other) for other in neutral):
            raise _rejected(f"has {name}={_shown(value)}, which is not supported", name)


def _check_values(config: AdapterConfig) -> None:
    init = config.init_lora_weights
    if (init.lower() if isinstance(init, str) else init) not in KEPT_BASE_INITS:
        raise _rejected(
            f"has init_lora_weights={_shown(init)}: such an adapter was trained against changed base weights. Save it as "
            "a plain LoRA first (PEFT's save_pretrained with path_initial_model_for_weight_conversion)",
            "init_lora_weights",
        )
    if isinstance(config.target_modules, str) and config.target_modules != "all-linear":
        raise _rejected(
            f"has target_modules={_shown(config.target_modules)}; supported are a list of names and 'all-linear'",
            "target_modules",
        )
    _check_rank("r", config.r)
    _check_alpha("lora_alpha", config.lora_alpha)
    for key, rank in config.rank_pattern.items():
        _check_pattern_key("rank_pattern", key)
        _check_rank(f"rank_pattern[{_shown(key)}]", rank)
    for key, alpha in config.alpha_pattern.items():
        _check_pattern_key("alpha_pattern", key)
        _check_alpha(f"alpha_pattern[{_shown(key)}]", alpha)


def _check_rank(field: str, rank: int) -> None:
    if rank < 1:
        raise _rejected(f"has {field}={rank}; a rank is at least 1", field)


def _check_alpha(field: str, alpha: float) -> None:
    if not abs(alpha) <= _FLOAT32_MAX:
        raise _rejected(f"has {field}={alpha}, which is out of range", field)


def _check_pattern_key(field: str, key: str) -> None:
    if len(key) > _MAX_PATTERN_KEY or not _PATTERN_KEY.fullmatch(key):
        raise _rejected(
            f"has {field} with the key {_shown(key)}; supported are module names, whole or their last parts",
            field,
        )


def _compile(patterns: dict[str, T]) -> list[tuple[re.Pattern[str], T]]:
    """A key is a module's name or its end after a dot, exactly as PEFT's get_pattern_key reads it.

    Harmless: `_PATTERN_KEY` lets no repetition through.
    """
    return [(re.compile(rf"(.*\.)?({key})$"), value) for key, value in patterns.items()]


def _first_match(rules: list[tuple[re.Pattern[str], T]], module: str, default: T) -> T:
    return next((value for pattern, value in rules if pattern.match(module)), default)


def _rejected(problem: str, param: str | None = None) -> AdapterRejectedError:
    return AdapterRejectedError(f"{CONFIG_NAME} {problem}", param=param)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
