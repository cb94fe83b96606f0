"""Grammars and logit biases through the whole server, one rank and two, in a pool so small that rows are preempted.

The models' weights are random: nothing but the grammar makes their text match.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tests.e2e.helpers import ONE_DEVICE, Background, Stream, wait_until
from tests.server import Reply, Server, running_server
from tests.tiny_models import EOS_ID, TinyModels

ADAPTER = "r16_all"
PROMPT = "The capital of"
TOO_LARGE = "((a{1000}){1000}){1000}"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "tags": {"type": "array", "items": {"enum": ["é", "世界"]}, "minItems": 1, "maxItems": 3},
        "size": {"type": "integer", "minimum": -5, "maximum": 1200},
        "open": {"type": "boolean"},
    },
    "required": ["name", "tags", "size", "open"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}
EBNF = 'root ::= ("yes" | "no") (", " ("maybe" | "ja\\u00fa" | [x-z]{2}))*  ". "\n'
REGEX = r"[a-f]{3,12}(é|世)[0-9]{4}"

CONSTRAINED: list[dict[str, Any]] = [
    {"temperature": 0, "json_schema": json.dumps(SCHEMA)},
    {"temperature": 1.3, "seed": 4, "json_schema": json.dumps(SCHEMA)},
    {"temperature": 0, "regex": REGEX},
    {"temperature": 2.0, "seed": 8, "top_p": 0.9, "regex": REGEX, "frequency_penalty": 1.0},
    {"temperature": 1.0, "seed": 9, "ebnf": EBNF, "logit_bias": {str(EOS_ID): -5.0}},
    {"temperature": 0, "regex": "[a-z]{30}", "ignore_eos": True, "min_new_tokens": 40},
]
FREE: list[dict[str, Any]] = [
    {"max_new_tokens": 40, "temperature": 0, "ignore_eos": True},
    {"max_new_tokens": 40, "temperature": 1.0, "seed": 3, "ignore_eos": True},
    {
        "max_new_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
        "logit_bias": {"40": 3.0, "41": 3.0, "77": -100.0},
    },
    {"max_new_tokens": 40, "temperature": 0, "repetition_penalty": 1.3, "min_new_tokens": 20},
]


def assert_matches(params: dict[str, Any], text: str) -> None:
    if "json_schema" in params:
        jsonschema.validate(json.loads(text), SCHEMA)
    elif "regex" in params:
        assert re.fullmatch(params["regex"], text), text
    elif "ebnf" in params:
        assert re.fullmatch(r"(yes|no)(, (maybe|jaú|[x-z]{2}))*\. ", text), text


@pytest.fixture(scope="module", params=[1, 2])
def tp_size(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module", params=ONE_DEVICE)
def server(
    request: pytest.FixtureRequest,
    tp_size: int,
    tiny_models: TinyModels,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Server]:
    if request.param == "cuda" and tp_size > 1:
        pytest.skip("one GPU")
    adapter = tiny_models.adapter("llama", ADAPTER)
    flags = ("--lora-paths", f"{ADAPTER}={adapter}", "--tp-size", tp_size)
    small = ("--page-size", 4, "--max-total-tokens", 256)
    logs = tmp_path_factory.mktemp("logs")
    with running_server(
        tiny_models.model("llama"), *flags, *small, log_dir=logs, device=request.param
    ) as one:
        yield one


def ask(server: Server, params: dict[str, Any], lora: str | None = None) -> Any:
    return server.generate(text=PROMPT, lora_path=lora, sampling_params={"max_new_tokens": 90, **params})


def test_a_mixed_batch_answers_as_each_alone(server: Server) -> None:
    """Rows of every kind, with an adapter and without; the pool holds a part of them at a time."""
    everything = [(params, lora) for params in CONSTRAINED + FREE for lora in (None, ADAPTER)]
    alone = [ask(server, params, lora) for params, lora in everything]
    preempted = server.ledger()["preemptions"]
    together = server.generate(
        text=[PROMPT] * len(everything),
        lora_path=[lora for _, lora in everything],
        sampling_params=[{"max_new_tokens": 90, **params} for params, _ in everything],
    )
    assert server.ledger()["preemptions"] > preempted
    for (params, _), one, other in zip(everything, alone, together, strict=True):
        assert one["output_ids"] == other["output_ids"]
        assert one["meta_info"]["finish_reason"] == other["meta_info"]["finish_reason"]
        if params in CONSTRAINED and other["meta_info"]["finish_reason"]["type"] == "stop":
            assert_matches(params, other["text"])
    ended = [answer["meta_info"]["finish_reason"]["type"] for answer in together[: 2 * len(CONSTRAINED)]]
    assert ended.count("stop") >= len(ended) - 2  # the ebnf has no longest text


def test_every_sample_matches(server: Server) -> None:
    params = {"temperature": 1.5, "seed": 1, "n": 5, "regex": REGEX}
    texts = [answer["text"] for answer in ask(server, params)]
    assert len(set(texts)) == 5
    for text in texts:
        assert_matches(params, text)


def test_a_biased_token_is_drawn_and_a_forbidden_one_is_not(server: Server) -> None:
    params = {"temperature": 0, "max_new_tokens": 6, "ignore_eos": True}
    plain = ask(server, params)["output_ids"]
    wanted = ask(server, {**params, "logit_bias": {"123": 100}})
    assert wanted["output_ids"] == [123] * 6
    unwanted = ask(server, {**params, "logit_bias": {str(plain[0]): -100}})["output_ids"]
    assert plain[0] not in unwanted


def test_a_stream_grows_to_a_match(server: Server) -> None:
    params = {"temperature": 1.0, "seed": 2, "max_new_tokens": 90, "json_schema": json.dumps(SCHEMA)}
    texts = [event["text"] for event in server.stream(text=PROMPT, sampling_params=params)]
    assert len(texts) > 5
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert_matches(params, texts[-1])


def test_ends(server: Server) -> None:
    """At once; by the grammar alone; by the end token; by the limit of tokens, inside the grammar."""
    empty = ask(server, {"temperature": 0, "regex": ""})
    assert (empty["text"], empty["meta_info"]["finish_reason"]) == ("", {"type": "stop", "matched": EOS_ID})
    ignoring = ask(server, {"temperature": 0, "regex": "", "ignore_eos": True})
    assert (ignoring["text"], ignoring["meta_info"]["finish_reason"]["type"]) == ("", "stop")
    whole = ask(server, {"temperature": 0, "regex": "[0-9]{3}"})
    assert re.fullmatch("[0-9]{3}", whole["text"])
    assert whole["meta_info"]["finish_reason"] == {"type": "stop", "matched": None}
    cut = ask(server, {"temperature": 0, "regex": "[0-9]{50}", "max_new_tokens": 4})
    assert re.fullmatch("[0-9]{4,}", cut["text"])
    assert cut["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    stopped = ask(server, {"temperature": 0, "regex": "[0-9]{3}END[a-z]+", "stop": "END"})
    assert re.fullmatch("[0-9]{3}", stopped["text"])
    assert stopped["meta_info"]["finish_reason"]["matched"] == "END"


def test_a_client_that_leaves_takes_its_matcher_along(server: Server) -> None:
    params = {"temperature": 0, "regex": "[a-z]+", "max_new_tokens": 220, "ignore_eos": True}
    stream = Stream(server, text=PROMPT, sampling_params=params)
    stream.wait_for_token()
    stream.hang_up()
    server.wait_idle()
    assert re.fullmatch(REGEX, ask(server, {"temperature": 0, "regex": REGEX})["text"])


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        ({"regex": "("}, "bad_grammar", "regex"),
        ({"json_schema": "{"}, "bad_grammar", "json_schema"),
        ({"ebnf": "root ::= other"}, "bad_grammar", "ebnf"),
        ({"regex": "a" * (1 << 17 | 1)}, "grammar_too_complex", "regex"),
        ({"regex": "a", "ebnf": 'root ::= "a"'}, "invalid_request", "ebnf"),
        ({"logit_bias": {"100000": 1}}, "invalid_request", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_request", "logit_bias"),
        ({"logit_bias": {"5": 101}}, "invalid_request", "logit_bias"),
        ({"logit_bias": {str(token): 1 for token in range(301)}}, "invalid_request", "logit_bias"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(
    server: Server, params: dict[str, Any], code: str, param: str
) -> None:
    body = {"text": [PROMPT, PROMPT], "sampling_params": [{"temperature": 0}, params]}
    for stream in (False, True):
        reply = server.post("/generate", {**body, "stream": stream})
        assert reply.status == 400
        error = reply.body["error"]
        assert (error["code"], error["param"]) == (code, f"sampling_params.{param}")


def test_a_grammar_that_takes_seconds_holds_up_nobody(server: Server) -> None:
    """Steps of another request go on from before the compilation to its end, when its time or memory is over."""
    ask(server, {"temperature": 0, "regex": "[0-9]{3}"})
    long = {"temperature": 0, "max_new_tokens": 220, "ignore_eos": True}
    stream = Stream(server, text=PROMPT, sampling_params=long)
    stream.wait_for_token()
    evil = {"text": PROMPT, "sampling_params": {"temperature": 0, "regex": TOO_LARGE}}
    refusal = Background(lambda: server.post("/generate", evil))
    before = len(stream.events)
    wait_until(lambda: len(stream.events) > before + 10 or not refusal.running, "ten more tokens")
    assert refusal.running
    assert re.fullmatch("[0-9]{3}", ask(server, {"temperature": 1, "regex": "[0-9]{3}"})["text"])
    reply: Reply = refusal.result()
    assert (reply.status, reply.body["error"]["code"]) == (400, "grammar_too_complex")
    stream.hang_up()
    server.wait_idle()
