"""A model's shapes, read from Hugging Face's `config.json`; what is not implemented is refused by name.

Pure: the scheduler, the loader and the workers all size things from this one value.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import msgspec

from manylora.runtime.errors import ConfigError, ManyloraError, ModelNotFoundError, ModelUnsupportedError

SUPPORTED_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
}
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# Config keys that change the arithmetic; any value but these means something we do not compute.
_NEUTRAL_VALUES: dict[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "pretraining_tp": (None, 1),
    "hidden_act": (None, "silu"),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "logit_scale": (None, 1, 1.0),
    "partial_rotary_factor": (None, 1, 1.0),
}


class RopeConfig(msgspec.Struct, frozen=True):
    """Rotary embedding. `rope_type` is "default", "linear" or "llama3"; the rest is llama3's (transformers' names)."""

    theta: float
    rope_type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """One dense decoder: Llama, Mistral, Qwen2/2.5 or Qwen3. All sizes are of the whole model, not of a rank."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool  # RMSNorm over head_dim on q and k before rotary (Qwen3)
    dtype: str  # as stored: "float32" | "float16" | "bfloat16"
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    def check_tp(self, tp_size: int) -> None:
        """Raise ConfigError naming the size that `tp_size` does not divide."""
        for name, size in (
            ("num_attention_heads", self.num_heads),
            ("hidden_size", self.hidden_size),
            ("intermediate_size", self.intermediate_size),
        ):
            if size % tp_size:
                raise ConfigError(
                    f"--tp-size {tp_size} does not divide the model's {name} ({size})", param="tp_size"
                )
        if max(self.num_kv_heads, tp_size) % min(self.num_kv_heads, tp_size):
            raise ConfigError(
                f"--tp-size {tp_size} and the model's num_key_value_heads ({self.num_kv_heads}): "
                "one must divide the other",
                param="tp_size",
            )

    def kv_heads_per_rank(self, tp_size: int) -> int:
        """KV heads of one rank; with fewer heads than ranks each is replicated on tp_size/num_kv_heads ranks."""
        return max(1, self.num_kv_heads // tp_size)


def load_model_config(model_dir: str | Path) -> ModelConfig:
    """Read `config.json` and `generation_config.json` of a local model directory.

    Raises ModelNotFoundError or ModelUnsupportedError.
    """
    directory = Path(model_dir)
    config = _read_json(directory / "config.json")
    generation_path = directory / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    return parse_model_config(config, generation)


def parse_model_config(config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    """The same from the two files' contents."""
    try:
        return _parse(config, generation or {})
    except KeyError as error:
        raise ModelUnsupportedError(
            f"the model's config lacks {error.args[0]}", param="model_path"
        ) from error
    except ManyloraError:
        raise
    except (TypeError, ValueError) as error:
        raise ModelUnsupportedError(
            f"the model's config cannot be understood: {error}", param="model_path"
        ) from error


def _parse(config: dict[str, Any], generation: dict[str, Any]) -> ModelConfig:
    family = _family(config)
    _refuse_unimplemented(config)
    heads = int(config["num_attention_heads"])
    attention_bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family=family,
        vocab_size=int(config["vocab_size"]),
        hidden_size=int(config["hidden_size"]),
        intermediate_size=int(config["intermediate_size"]),
        num_layers=int(config["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=int(config.get("num_key_value_heads") or heads),
        head_dim=int(config.get("head_dim") or int(config["hidden_size"]) // heads),
        rms_norm_eps=float(config.get("rms_norm_eps", 1e-6)),
        rope=_rope(config),
        max_position_embeddings=int(config.get("max_position_embeddings", 4096)),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias and family in ("llama", "qwen3"),
        mlp_bias=bool(config.get("mlp_bias", False)),
        qk_norm=family == "qwen3",
        dtype=_dtype(config),
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_eos(config, generation),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ModelNotFoundError(f"{path} does not exist", param="model_path") from error
    except (OSError, ValueError) as error:
        raise ModelUnsupportedError(f"{path} cannot be read: {error}", param="model_path") from error
    if not isinstance(value, dict):
        raise ModelUnsupportedError(f"{path} is not a JSON object", param="model_path")
    return cast(dict[str, Any], value)


def _family(config: dict[str, Any]) -> str:
    architectures: list[str] = config.get("architectures") or []
    for name in architectures:
        if name in SUPPORTED_ARCHITECTURES:
            return SUPPORTED_ARCHITECTURES[name]
    raise ModelUnsupportedError(
        f"architecture {', '.join(architectures) or '(none)'} is not supported; "
        f"supported are {', '.join(SUPPORTED_ARCHITECTURES)}"
    )


def _refuse_unimplemented(config: dict[str, Any]) -> None:
    for key, neutral in _NEUTRAL_VALUES.items():
        if config.get(key) not in neutral:
            raise ModelUnsupportedError(
                f"the model's config has {key}={config[key]!r}, which is not implemented"
            )
    window_on = config.get("use_sliding_window", True)  # Qwen writes a window and switches it off beside it
    if config.get("sliding_window") is not None and window_on:
        raise ModelUnsupportedError(
            f"the model's config has sliding_window={config['sliding_window']}, which is not implemented"
        )
    if any(kind != "full_attention" for kind in config.get("layer_types") or ()):
        raise ModelUnsupportedError("the model's config has layer_types other than full_attention")


def _rope(config: dict[str, Any]) -> RopeConfig:
    # transformers 5 writes one `rope_parameters`; earlier releases `rope_theta` and `rope_scaling`.
    scaling: dict[str, Any] = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(scaling.get("rope_theta", config.get("rope_theta", 10000.0)))
    rope_type = scaling.get("rope_type", scaling.get("type", "default"))
    if rope_type not in ("default", "linear", "llama3"):
        raise ModelUnsupportedError(
            f"the model's config has rope_type={rope_type!r}, which is not implemented"
        )
    if scaling.get("partial_rotary_factor", 1) != 1:
        raise ModelUnsupportedError("the model's config has partial_rotary_factor, which is not implemented")
    if rope_type == "default":
        return RopeConfig(theta)
    if rope_type == "linear":
        return RopeConfig(theta, "linear", float(scaling["factor"]))
    return RopeConfig(
        theta,
        "llama3",
        float(scaling["factor"]),
        float(scaling["low_freq_factor"]),
        float(scaling["high_freq_factor"]),
        int(scaling["original_max_position_embeddings"]),
    )


def _dtype(config: dict[str, Any]) -> str:
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype not in DTYPE_BYTES:
        raise ModelUnsupportedError(
            f"the model's config has dtype={dtype!r}; supported are {sorted(DTYPE_BYTES)}"
        )
    return dtype


def _eos(config: dict[str, Any], generation: dict[str, Any]) -> tuple[int, ...]:
    """Of both files. What lies outside the vocabulary can never be drawn, and is no index for the workers."""
    found: list[int] = []
    for value in (config.get("eos_token_id"), generation.get("eos_token_id")):
        tokens = cast(list[int | None], value if isinstance(value, list) else [value])
        found += [token for token in tokens if token is not None and token not in found]
    return tuple(token for token in found if 0 <= token < int(config["vocab_size"]))
