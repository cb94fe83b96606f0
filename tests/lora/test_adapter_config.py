"""adapter_config.json: PEFT's own files, its rank and alpha rules, and every option that is refused."""

import dataclasses
import json
import math
import warnings
from typing import Any

import pytest
from peft import LoraConfig
from peft.tuners.lora import EvaConfig
from peft.utils.other import get_pattern_key

from manylora.lora.adapter_config import (
    IGNORED_FIELDS,
    NEUTRAL_VALUES,
    READ_FIELDS,
    AdapterConfig,
    parse_adapter_config,
)
from manylora.runtime.errors import AdapterRejectedError

MODULE = "model.layers.3.self_attn.q_proj"


def saved(tmp_path: Any, **options: Any) -> bytes:
    """The bytes PEFT writes for these options."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        LoraConfig(**{"target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **options}).save_pretrained(
            str(tmp_path)
        )
    return (tmp_path / "adapter_config.json").read_bytes()


def parse(**fields: Any) -> AdapterConfig:
    return parse_adapter_config(
        json.dumps({"peft_type": "LORA", "r": 8, "lora_alpha": 16, **fields}).encode()
    )


def test_every_field_of_peft_is_classified_once() -> None:
    fields = {field.name for field in dataclasses.fields(LoraConfig)}
    classes = (READ_FIELDS, IGNORED_FIELDS, frozenset(NEUTRAL_VALUES))
    assert fields <= frozenset().union(*classes)
    assert sum(map(len, classes)) == len(frozenset().union(*classes))


def test_plain_config(tmp_path: Any) -> None:
    config = parse_adapter_config(saved(tmp_path, r=8, lora_alpha=12))
    assert config.rank(MODULE) == 8
    assert config.scaling(MODULE) == 1.5


def test_rslora_divides_by_the_root(tmp_path: Any) -> None:
    config = parse_adapter_config(saved(tmp_path, r=16, lora_alpha=8, use_rslora=True))
    assert config.scaling(MODULE) == pytest.approx(8 / math.sqrt(16))


def test_patterns_change_rank_and_alpha(tmp_path: Any) -> None:
    config = parse_adapter_config(
        saved(
            tmp_path,
            r=8,
            lora_alpha=16,
            rank_pattern={"layers.3.self_attn.q_proj": 4, "k_proj": 2},
            alpha_pattern={"q_proj": 40},
        )
    )
    assert (config.rank(MODULE), config.scaling(MODULE)) == (4, 10.0)
    assert (config.rank("model.layers.0.self_attn.q_proj"), config.rank("m.k_proj")) == (8, 2)


@pytest.mark.parametrize(
    "keys",
    [
        ["q_proj"],
        ["proj"],
        ["self_attn.q_proj", "q_proj"],
        ["q_proj", "self_attn.q_proj"],
        [MODULE],
        ["^" + MODULE],
        ["^q_proj"],
        ["q_proj$"],
        [r"layers\.3\.self_attn\.q_proj"],
        ["layers.33.self_attn.q_proj", "layers.3.self_attn.q_proj"],
        ["layersX3.self_attn.q_proj"],
        ["layers.3.self.attn.q.proj"],  # a dot of a key is any character to PEFT
        ["k_proj", "v_proj"],
    ],
)
def test_pattern_keys_match_as_in_peft(keys: list[str]) -> None:
    ranks = {key: 100 + index for index, key in enumerate(keys)}
    expected = ranks.get(get_pattern_key(list(ranks), MODULE), 8)
    assert parse(rank_pattern=ranks).rank(MODULE) == expected


@pytest.mark.parametrize(
    "key", ["(a+)+b", ".*q_proj", "q_proj|k_proj", "[qk]_proj", "q_proj ", "", "x" * 513]
)
@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_pattern_keys_that_are_regular_expressions_are_refused(field: str, key: str) -> None:
    with pytest.raises(AdapterRejectedError, match=field):
        parse(**{field: {key: 4}})


@pytest.mark.parametrize(
    "options",
    [
        {"init_lora_weights": False},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
        {"init_lora_weights": "eva", "eva_config": EvaConfig()},
        {"target_modules": "all-linear"},
        {"exclude_modules": ["lm_head"]},
        {"layers_to_transform": [0, 1], "layers_pattern": "layers"},
        {"lora_dropout": 0.5},
        {"inference_mode": True},
        {"task_type": None},
    ],
    ids=str,
)
def test_options_without_effect_on_inference(tmp_path: Any, options: dict[str, Any]) -> None:
    assert parse_adapter_config(saved(tmp_path, **options)).rank(MODULE) == 8


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"layer_replication": [(0, 2), (1, 2)]}, "layer_replication"),
        ({"alora_invocation_tokens": [5, 6]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
        ({"target_parameters": ["mlp.gate_up_proj"]}, "target_parameters"),
        ({"megatron_config": {"tensor_parallel": 2}}, "megatron_config"),
        ({"ensure_weight_tying": True}, "ensure_weight_tying"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "pissa_niter_16"}, "init_lora_weights"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"init_lora_weights": "corda"}, "init_lora_weights"),
        ({"init_lora_weights": "lora_ga"}, "init_lora_weights"),
        ({"target_modules": ".*(q|v)_proj"}, "target_modules"),
    ],
    ids=str,
)
def test_options_peft_writes_and_we_refuse(tmp_path: Any, options: dict[str, Any], field: str) -> None:
    data = saved(tmp_path, **options)
    with pytest.raises(AdapterRejectedError, match=rf"\b{field}=") as caught:
        parse_adapter_config(data)
    assert caught.value.param == field


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4}}, "init_lora_weights='loftq'"),
        ({"arrow_config": {"top_k": 3}}, "arrow_config"),
        ({"use_bdlora": {"nblocks": 2}}, "use_bdlora"),
        ({"velora_config": {"scale": 1.0}}, "velora_config"),
        ({"monteclora_config": {"num_samples": 4}}, "monteclora_config"),
        ({"kasa_config": {"beta": 0.1}}, "kasa_config"),
        ({"peft_type": "IA3"}, "peft_type='IA3'"),
        ({"auto_map": {"AutoModel": "evil.Model"}}, "auto_map"),
        ({"invented_tomorrow": 1}, "invented_tomorrow=1"),
        ({"r": 0}, "r=0"),
        ({"r": -4}, "r=-4"),
        ({"r": "8"}, "malformed"),
        ({"r": True}, "malformed"),
        ({"r": None}, "malformed"),
        ({"lora_alpha": "16"}, "malformed"),
        ({"lora_alpha": 1e300}, "lora_alpha=1e"),
        ({"lora_alpha": math.nan}, "not valid JSON"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern"),
        ({"rank_pattern": {"q_proj": 1.5}}, "malformed"),
        ({"alpha_pattern": {"q_proj": None}}, "malformed"),
        ({"target_modules": [1]}, "malformed"),
    ],
    ids=str,
)
def test_fields_refused_by_name(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(AdapterRejectedError, match=named):
        parse(**fields)


@pytest.mark.parametrize("value", [None, False, "", [], {}])
def test_unknown_fields_may_be_neutral(value: Any) -> None:
    assert parse(invented_tomorrow=value).r == 8


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (b"", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b'{"r": 8, "lora_alpha": 8}', "peft_type"),
        (b" " * 300_000, "300000 bytes"),
    ],
    ids=["empty", "list", "not-text", "deep", "no-type", "long"],
)
def test_broken_files(data: bytes, named: str) -> None:
    with pytest.raises(AdapterRejectedError, match=named):
        parse_adapter_config(data)
