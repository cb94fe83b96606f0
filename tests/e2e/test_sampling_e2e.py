"""Sampling, penalties, stops and logprobs through the whole server, with two steps in flight and with one.

Every test runs against both; what the oracle can say (greedy, penalties, distributions, stops) it says, and
`test_overlap_changes_nothing` compares all answers of the two, seeded draws included.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.e2e.helpers import ONE_DEVICE
from tests.reference import Reference, clear_prompts
from tests.server import Server, running_server
from tests.tiny_models import EOS_ID, EOT_ID, TinyModels

ADAPTER = "r16_all"
PENALTIES: list[dict[str, Any]] = [
    {"frequency_penalty": 1.5},
    {"presence_penalty": -2.0},
    {"repetition_penalty": 1.4},
    {"frequency_penalty": -0.7, "presence_penalty": 0.9, "repetition_penalty": 0.8},
]


@dataclass(frozen=True)
class Setup:
    model_dir: Path
    adapter_dir: Path
    reference: Reference
    tokenizer: Any
    prompts: list[list[int]]

    def greedy(self, prompt: list[int], num_tokens: int, adapter: str | None = ADAPTER) -> list[int]:
        return self.reference.generate(self.adapter_dir if adapter else None, prompt, num_tokens).tokens


@pytest.fixture(scope="module")
def setup(tiny_models: TinyModels) -> Setup:
    model_dir, adapter_dir = tiny_models.model("llama"), tiny_models.adapter("llama", ADAPTER)
    reference = Reference(model_dir)
    prompts = clear_prompts(reference, [None, adapter_dir], lengths=(9, 24, 40), num_tokens=24, seed=3)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    return Setup(model_dir, adapter_dir, reference, tokenizer, prompts)


@pytest.fixture(scope="module", params=ONE_DEVICE)
def servers(
    request: pytest.FixtureRequest, setup: Setup, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Server]]:
    """One with two steps in flight, one with one. On a GPU they share its memory, the second beside the first."""
    common = ("--lora-paths", f"{ADAPTER}={setup.adapter_dir}", "--max-total-tokens", 8192)
    serially = ("--disable-overlap-schedule", "--mem-fraction-static", 0.25)
    where: dict[str, Any] = {"device": request.param, "log_dir": tmp_path_factory.mktemp("logs")}
    with (
        running_server(setup.model_dir, *common, **where) as overlapped,
        running_server(setup.model_dir, *common, *serially, **where) as serial,
    ):
        yield {"overlap": overlapped, "serial": serial}


@pytest.fixture(params=["overlap", "serial"])
def server(request: pytest.FixtureRequest, servers: dict[str, Server]) -> Server:
    return servers[request.param]


def ask(server: Server, input_ids: Any, lora_path: str | None = ADAPTER, **fields: Any) -> Any:
    """`fields` of /generate's body are passed on, all others are sampling parameters."""
    body = {key: fields.pop(key) for key in list(fields) if key in BODY_FIELDS}
    return server.generate(input_ids=input_ids, lora_path=lora_path, sampling_params=fields, **body)


BODY_FIELDS = {"return_logprob", "top_logprobs_num", "logprob_start_len"}


@pytest.mark.parametrize("penalties", PENALTIES, ids=lambda p: "+".join(p))
def test_penalised_greedy_is_the_references(server: Server, setup: Setup, penalties: dict[str, Any]) -> None:
    for prompt in setup.prompts:
        answer = ask(server, prompt, temperature=0, max_new_tokens=20, ignore_eos=True, **penalties)
        assert answer["output_ids"] == penalised_greedy(setup, prompt, 20, **penalties)


def penalised_greedy(
    setup: Setup,
    prompt: list[int],
    num_tokens: int,
    frequency_penalty: float = 0.0,
    presence_penalty: float = 0.0,
    repetition_penalty: float = 1.0,
) -> list[int]:
    """Repetition over prompt and answer, frequency and presence over the answer."""
    tokens: list[int] = []
    for _ in range(num_tokens):
        scores = setup.reference.logits(setup.adapter_dir, prompt + tokens)[-1].clone()
        for token in set(prompt + tokens):
            scores[token] *= repetition_penalty if scores[token] <= 0 else 1 / repetition_penalty
        for token, count in Counter(tokens).items():
            scores[token] -= frequency_penalty * count + presence_penalty
        tokens.append(int(scores.argmax()))
    return tokens


def test_a_stop_string_cuts_text_ids_and_logprobs(server: Server, setup: Setup) -> None:
    for prompt in setup.prompts:
        tokens = setup.greedy(prompt, 24)
        whole = setup.tokenizer.decode(tokens)
        stop = next(whole[i : i + 2] for i in range(4, len(whole)) if whole[i : i + 2].isascii())
        answer = ask(
            server,
            prompt,
            temperature=0,
            max_new_tokens=24,
            ignore_eos=True,
            stop=[stop],
            return_logprob=True,
        )
        assert answer["text"] == whole[: whole.index(stop)]
        meta = answer["meta_info"]
        assert meta["finish_reason"] == {"type": "stop", "matched": stop}
        count = len(answer["output_ids"])
        assert answer["output_ids"] == tokens[:count]
        assert stop in setup.tokenizer.decode(tokens[:count])
        assert stop not in setup.tokenizer.decode(tokens[: count - 1])
        assert meta["completion_tokens"] == count == len(meta["output_token_logprobs"])


def test_no_stop_trim_keeps_the_stop_string(server: Server, setup: Setup) -> None:
    prompt = setup.prompts[0]
    whole = setup.tokenizer.decode(setup.greedy(prompt, 24))
    stop = next(whole[i : i + 2] for i in range(4, len(whole)) if whole[i : i + 2].isascii())
    answer = ask(
        server, prompt, temperature=0, max_new_tokens=24, ignore_eos=True, stop=stop, no_stop_trim=True
    )
    assert answer["text"] == whole[: whole.index(stop)] + stop


def test_a_stop_token_ends_the_answer(server: Server, setup: Setup) -> None:
    for prompt in setup.prompts:
        tokens = setup.greedy(prompt, 24)
        stop = tokens[7]
        first = tokens.index(stop)
        answer = ask(server, prompt, temperature=0, max_new_tokens=24, ignore_eos=True, stop_token_ids=[stop])
        assert answer["output_ids"] == tokens[: first + 1]
        assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}


@pytest.mark.parametrize("eos", [EOS_ID, EOT_ID])
def test_every_eos_of_the_generation_config_ends_and_min_new_tokens_holds_it_off(
    server: Server, setup: Setup, eos: int
) -> None:
    """The reference finds a prompt whose greedy answer comes to that eos by itself."""
    prompt = prompt_that_ends(setup, eos)
    answer = ask(server, prompt, None, temperature=0, max_new_tokens=8)
    assert answer["output_ids"][-1] == eos
    assert answer["meta_info"]["finish_reason"] == {"type": "stop", "matched": eos}
    count = len(answer["output_ids"])
    held = ask(server, prompt, None, temperature=0, max_new_tokens=count + 4, min_new_tokens=count + 2)
    assert len(held["output_ids"]) >= count + 2
    assert not {EOS_ID, EOT_ID} & set(held["output_ids"][: count + 1])
    assert held["output_ids"][: count - 1] == answer["output_ids"][:-1]
    ignored = ask(server, prompt, None, temperature=0, max_new_tokens=count + 4, ignore_eos=True)
    assert ignored["output_ids"][:count] == answer["output_ids"]
    assert len(ignored["output_ids"]) == count + 4


def prompt_that_ends(setup: Setup, eos: int) -> list[int]:
    """A random prompt whose greedy answer of the base model has `eos` among its first eight tokens."""
    generator = torch.Generator().manual_seed(eos)
    for _ in range(2000):
        prompt = torch.randint(3, 300, (6,), generator=generator).tolist()
        tokens = setup.reference.generate(None, prompt, 8, stop_ids=(EOS_ID, EOT_ID)).tokens
        if tokens[-1] == eos:
            return prompt
    raise AssertionError("no such prompt")


def test_draws_follow_the_models_distribution(server: Server, setup: Setup) -> None:
    """1024 seeded draws of one token; each frequent token's count lies within five sigma of the reference's."""
    prompt = setup.prompts[1]
    probs = (setup.reference.logits(setup.adapter_dir, prompt)[-1] / 3.0).softmax(-1)
    counts = draw(server, prompt, temperature=3.0, num_calls=8)
    total = sum(counts.values())
    for token in probs.topk(12).indices.tolist():
        p = float(probs[token])
        sigma = (total * p * (1 - p)) ** 0.5
        assert abs(counts[token] - total * p) < 5 * sigma + 1, token


@pytest.mark.parametrize(
    "limits",
    [{"top_k": 5}, {"top_p": 0.4}, {"min_p": 0.2}, {"top_k": 12, "top_p": 0.5, "min_p": 0.1}],
    ids=lambda limits: "+".join(limits),
)
def test_no_draw_leaves_the_allowed_set(server: Server, setup: Setup, limits: dict[str, Any]) -> None:
    prompt = setup.prompts[1]
    probs = (setup.reference.logits(setup.adapter_dir, prompt)[-1] / 3.0).softmax(-1)
    allowed = allowed_tokens(probs, **limits)
    drawn = draw(server, prompt, temperature=3.0, num_calls=2, **limits)
    assert set(drawn) <= allowed
    if len(allowed) <= 6:
        assert set(drawn) == allowed


def allowed_tokens(probs: torch.Tensor, top_k: int = -1, top_p: float = 1.0, min_p: float = 0.0) -> set[int]:
    """Of the sorted whole distribution: rank below top_k, mass before it below top_p, at least min_p of the best."""
    values, ids = probs.sort(descending=True)
    keep = (values.cumsum(0) - values < top_p) & (values >= min_p * values[0])
    if top_k > 0:
        keep[top_k:] = False
    return set(ids[keep].tolist())


def draw(server: Server, prompt: list[int], *, num_calls: int, **params: Any) -> Counter[int]:
    """First tokens of num_calls · 128 samples."""
    counts: Counter[int] = Counter()
    for seed in range(num_calls):
        answers = ask(server, prompt, max_new_tokens=1, ignore_eos=True, n=128, seed=seed, **params)
        counts.update(answer["output_ids"][0] for answer in answers)
    return counts


def test_a_seed_repeats_and_samples_differ(server: Server, setup: Setup) -> None:
    params = {"temperature": 2.0, "max_new_tokens": 12, "ignore_eos": True}
    first = ask(server, setup.prompts[2], n=3, seed=11, **params)
    again = ask(server, setup.prompts[2], n=3, seed=11, **params)
    other = ask(server, setup.prompts[2], n=3, seed=12, **params)
    assert [a["output_ids"] for a in first] == [a["output_ids"] for a in again]
    assert len({tuple(a["output_ids"]) for a in first + other}) == 6


def test_a_draw_does_not_depend_on_its_neighbours(server: Server, setup: Setup) -> None:
    params = {"temperature": 2.0, "max_new_tokens": 12, "ignore_eos": True}
    alone = [ask(server, prompt, seed=5, **params)["output_ids"] for prompt in setup.prompts]
    together = server.generate(
        input_ids=[*setup.prompts, *setup.prompts],
        lora_path=[ADAPTER] * 3 + [None] * 3,
        sampling_params=[{**params, "seed": 5}] * 6,
    )
    assert [answer["output_ids"] for answer in together[:3]] == alone


def test_overlap_changes_nothing(servers: dict[str, Server], setup: Setup) -> None:
    """Mixed lengths, ends, stops, penalties and seeds in one batch: every field but the times is the same."""
    common = {"max_new_tokens": 24}
    params = [
        {"temperature": 0},
        {"temperature": 0, "frequency_penalty": 1.0, "min_new_tokens": 5},
        {"temperature": 1.5, "seed": 1, "top_k": 20},
        {"temperature": 1.0, "seed": 2, "top_p": 0.9, "stop_token_ids": list(range(40, 90))},
        {"temperature": 2.0, "seed": 3, "repetition_penalty": 1.2, "stop": ["e", " a", "t"]},
        {"temperature": 0.7, "seed": 4, "max_new_tokens": 1},
    ]
    body = {
        "input_ids": [setup.prompts[i % 3] for i in range(6)],
        "lora_path": [ADAPTER, None] * 3,
        "sampling_params": [{**common, **one} for one in params],
        "return_logprob": True,
        "top_logprobs_num": 2,
    }
    answers = {name: server.generate(**body) for name, server in servers.items()}
    for one, two in zip(answers["overlap"], answers["serial"], strict=True):
        assert comparable(one) == comparable(two)
        logprobs = [[value for value, _, _ in a["meta_info"]["output_token_logprobs"]] for a in (one, two)]
        assert logprobs[0] == pytest.approx(logprobs[1], abs=1e-4)


def comparable(answer: dict[str, Any]) -> dict[str, Any]:
    meta = answer["meta_info"]
    fields = ("finish_reason", "prompt_tokens", "completion_tokens", "lora_name")
    return {
        "text": answer["text"],
        "output_ids": answer["output_ids"],
        "meta": {name: meta[name] for name in fields},
        "top_ids": [[token for _, token, _ in row] for row in meta["output_top_logprobs"]],
    }


def test_a_stream_tells_the_same_as_the_whole(server: Server, setup: Setup) -> None:
    body = {
        "input_ids": setup.prompts,
        "lora_path": [ADAPTER, None, ADAPTER],
        "sampling_params": {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True},
    }
    whole = server.generate(**body)
    last: dict[int, Any] = {}
    for event in server.stream(**body):
        before = last.get(event["index"], {"text": "", "output_ids": []})
        assert event["text"].startswith(before["text"])
        assert event["output_ids"][: len(before["output_ids"])] == before["output_ids"]
        last[event["index"]] = event
    assert [comparable_text(last[i]) for i in range(3)] == [comparable_text(answer) for answer in whole]


def comparable_text(answer: dict[str, Any]) -> tuple[str, list[int], Any]:
    return answer["text"], answer["output_ids"], answer["meta_info"]["finish_reason"]
