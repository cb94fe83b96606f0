"""config.json -> ModelConfig: what is read, and that everything unimplemented is refused by its name."""

from typing import Any

import pytest

from manylora.runtime.errors import ConfigError, ModelUnsupportedError
from manylora.runtime.model_config import parse_model_config

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 131072,
    "eos_token_id": [128001, 128008, 128009],
    "bos_token_id": 128000,
    "torch_dtype": "bfloat16",
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}


def test_llama_3_1() -> None:
    model = parse_model_config(LLAMA, {"eos_token_id": [128001, 7]})
    assert (model.family, model.head_dim, model.dtype) == ("llama", 128, "bfloat16")
    assert model.eos_token_ids == (128001, 128008, 128009, 7)
    assert (model.rope.rope_type, model.rope.theta, model.rope.factor) == ("llama3", 500000.0, 8.0)
    assert not any((model.qkv_bias, model.o_bias, model.qk_norm, model.tie_word_embeddings))


def test_an_end_token_outside_the_vocabulary_is_none() -> None:
    assert parse_model_config({**LLAMA, "eos_token_id": [-1, 7, 128256]}).eos_token_ids == (7,)
    assert parse_model_config({**LLAMA, "eos_token_id": None}, {"eos_token_id": -1}).eos_token_ids == ()


def test_transformers_5_writes_rope_parameters() -> None:
    config = {k: v for k, v in LLAMA.items() if k not in ("rope_theta", "rope_scaling")}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert parse_model_config(config).rope.theta == 10000.0


@pytest.mark.parametrize(
    ("architecture", "qkv_bias", "qk_norm"),
    [
        ("MistralForCausalLM", False, False),
        ("Qwen2ForCausalLM", True, False),
        ("Qwen3ForCausalLM", False, True),
    ],
)
def test_families_differ_by_data(architecture: str, qkv_bias: bool, qk_norm: bool) -> None:
    model = parse_model_config({**LLAMA, "architectures": [architecture]})
    assert (model.qkv_bias, model.qk_norm) == (qkv_bias, qk_norm)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None}, "none"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"sliding_window": 4096}, "sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"torch_dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelUnsupportedError, match=named):
        parse_model_config({**LLAMA, **change})


def test_a_sliding_window_that_is_switched_off_is_fine() -> None:
    config = {
        **LLAMA,
        "architectures": ["Qwen2ForCausalLM"],
        "sliding_window": 4096,
        "use_sliding_window": False,
    }
    assert parse_model_config(config).family == "qwen2"


@pytest.mark.parametrize(("tp_size", "named"), [(3, "num_attention_heads"), (64, "num_attention_heads")])
def test_tp_must_divide(tp_size: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_model_config(LLAMA).check_tp(tp_size)


def test_kv_heads_above_and_below_tp() -> None:
    model = parse_model_config(LLAMA)
    model.check_tp(16)
    assert [model.kv_heads_per_rank(tp) for tp in (1, 2, 8, 16)] == [8, 4, 1, 1]


def test_what_is_missing_or_of_another_type_is_said() -> None:
    lacking = {key: value for key, value in LLAMA.items() if key != "hidden_size"}
    with pytest.raises(ModelUnsupportedError, match="lacks hidden_size"):
        parse_model_config(lacking)
    with pytest.raises(ModelUnsupportedError, match="lacks factor"):
        parse_model_config({**LLAMA, "rope_scaling": {"rope_type": "linear"}})
    with pytest.raises(ModelUnsupportedError, match="cannot be understood"):
        parse_model_config({**LLAMA, "num_hidden_layers": "many"})
