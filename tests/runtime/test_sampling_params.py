"""Sampling parameters: every bound has a message that names the field."""

from typing import Any

import msgspec
import pytest

from manylora.runtime.bounds import MAX_GRAMMAR_BYTES
from manylora.runtime.errors import BadRequestError, GrammarTooComplexError
from manylora.runtime.sampling_params import GRAMMAR_FIELDS, SamplingParams


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("temperature", 1e308),  # infinite as float32
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("top_p", float("nan")),
        ("min_p", -0.1),
        ("min_p", float("nan")),
        ("top_k", 0),
        ("top_k", -2),
        ("frequency_penalty", 2.1),
        ("presence_penalty", -2.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-39),  # a logit divided by it is infinite
        ("max_new_tokens", -1),
        ("max_new_tokens", 2**40),
        ("min_new_tokens", -1),
        ("min_new_tokens", 129),
        ("n", 0),
        ("n", 10**6),
        ("stop", ["ok", ""]),
        ("stop", ["x"] * 33),
        ("stop_token_ids", [100]),
        ("stop_token_ids", [-1]),
        ("seed", -1),
        ("sampling_seed", 2**63),
        ("logit_bias", {100: 1.0}),
        ("logit_bias", {-1: 1.0}),
        ("logit_bias", {5: 100.5}),
        ("logit_bias", {5: -100.5}),
        ("logit_bias", {5: float("nan")}),
        ("logit_bias", dict.fromkeys(range(301), 1.0)),
    ],
)
def test_out_of_range_is_refused_with_the_fields_name(field: str, value: Any) -> None:
    with pytest.raises(BadRequestError, match=field) as caught:
        SamplingParams(**{field: value}).validate(vocab_size=100)
    assert caught.value.param == f"sampling_params.{field}"


def test_the_defaults_and_the_edges_are_valid() -> None:
    SamplingParams().validate(100)
    edges: dict[str, Any] = {
        "temperature": 0,
        "top_p": 1,
        "top_k": -1,
        "min_p": 1,
        "max_new_tokens": 0,
        "n": 128,
        "logit_bias": {0: -100.0, 99: 100.0},
    }
    SamplingParams(**edges, stop="x", stop_token_ids=[99], seed=2**63 - 1).validate(100)


def test_unknown_fields_are_refused() -> None:
    with pytest.raises(msgspec.ValidationError, match="best_of"):
        msgspec.json.decode(b'{"best_of": 3}', type=SamplingParams)


def test_stop_strings_is_a_tuple_either_way() -> None:
    assert SamplingParams().stop_strings == ()
    assert SamplingParams(stop="a").stop_strings == ("a",)
    assert SamplingParams(stop=["a", "b"]).stop_strings == ("a", "b")


def test_one_grammar_at_most() -> None:
    for field in GRAMMAR_FIELDS:
        params = SamplingParams(**{field: "{}"})  # type: ignore[arg-type]
        params.validate(100)
        assert params.grammar == (field, "{}")
    assert SamplingParams().grammar is None
    with pytest.raises(BadRequestError, match="json_schema and ebnf are given") as caught:
        SamplingParams(json_schema="{}", ebnf="").validate(100)
    assert caught.value.param == "sampling_params.ebnf"


def test_a_grammar_is_bounded_in_bytes() -> None:
    SamplingParams(regex="é" * (MAX_GRAMMAR_BYTES // 2)).validate(100)
    with pytest.raises(GrammarTooComplexError) as caught:
        SamplingParams(regex="é" * (MAX_GRAMMAR_BYTES // 2) + "a").validate(100)
    assert caught.value.param == "sampling_params.regex"


def test_biases_come_from_json_under_their_tokens() -> None:
    params = msgspec.json.decode(b'{"logit_bias": {"17": 1, "3": -2.5}}', type=SamplingParams)
    assert params.logit_bias == {17: 1.0, 3: -2.5}
