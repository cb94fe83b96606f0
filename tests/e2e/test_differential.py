"""The server against transformers + PEFT in fp32: the same greedy tokens, the same logprobs, for every adapter kind.

One launch per case; inside it every adapter alone, all together in one batch, chunked and not, with prefix hits and
without. The default cases pair every two of (family, tp, sharding, chunk); the whole product is `slow`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.reference import Answer, Reference, clear_prompts
from tests.server import Server, running_server
from tests.tiny_models import ADAPTERS, FAMILIES, TinyModels

NUM_TOKENS = 8
TOLERANCE = 1e-4
# Below, at and above the page size of 16, and above the small chunk of 32.
PROMPT_LENGTHS = (5, 16, 33, 70, 15, 48, 21, 100, 31, 64, 17, 32)
KINDS: tuple[str | None, ...] = (None, *ADAPTERS)
# The two that come first and last share an adapter with another request of the batch.
MIXED = ("r64_all", None, *ADAPTERS, None, "r4_qv")


class Case(NamedTuple):
    """One launch. With `chunk` 32 most prompts are prefilled in pieces, with 4096 none is."""

    family: str
    tp: int
    sharding: str
    chunk: int
    device: str = "cpu"


PAIRWISE = [
    Case("llama", 1, "slora", 32),
    Case("llama", 2, "slora", 4096),
    Case("llama", 4, "replicated", 32),
    Case("llama_bias_tied", 2, "replicated", 32),
    Case("llama_one_kv_head", 2, "slora", 32),
    Case("llama_one_kv_head", 4, "slora", 4096),
    Case("mistral", 4, "slora", 32),
    Case("mistral", 1, "replicated", 4096),
    Case("qwen2", 2, "slora", 32),
    Case("qwen2", 4, "replicated", 4096),
    Case("qwen3", 1, "replicated", 32),
    Case("qwen3", 2, "slora", 4096),
]
PRODUCT = [
    Case(*values)
    for values in product(FAMILIES, (1, 2, 4), ("slora", "replicated"), (32, 4096))
    if Case(*values) not in PAIRWISE
]
ONE_GPU = [
    Case(family, 1, "slora", chunk, "cuda") for family, chunk in zip(FAMILIES, (32, 4096) * 3, strict=True)
]
TWO_GPUS = [
    Case(family, 2, sharding, chunk, "cuda")
    for family, sharding, chunk in (
        ("llama", "slora", 32),
        ("llama", "replicated", 4096),
        ("llama_one_kv_head", "slora", 4096),
        ("llama_bias_tied", "replicated", 32),
        ("qwen2", "replicated", 32),
        ("qwen3", "slora", 32),
    )
]


@dataclass(frozen=True)
class Oracle:
    """The reference of one family, its adapters' directories and one prompt per length, all with clear margins."""

    reference: Reference
    paths: dict[str | None, Path | None]
    prompts: list[list[int]]

    def answer(self, kind: str | None, prompt: list[int]) -> Answer:
        return self.reference.generate(self.paths[kind], prompt, NUM_TOKENS)


@dataclass(frozen=True)
class Served:
    case: Case
    server: Server
    oracle: Oracle


@pytest.fixture(scope="module")
def oracles() -> dict[str, Oracle]:
    """Filled as families come along."""
    return {}


def cases() -> list[Any]:
    """Every case with its marks; cases of one family lie together, so that one reference at a time is in use."""
    marked = [(case, ()) for case in PAIRWISE]
    marked += [(case, (pytest.mark.slow,)) for case in PRODUCT]
    marked += [(case, (pytest.mark.gpu,)) for case in ONE_GPU]
    marked += [(case, (pytest.mark.multigpu,)) for case in TWO_GPUS]
    return [pytest.param(case, marks=marks, id="-".join(map(str, case))) for case, marks in marked]


@pytest.fixture(scope="module", params=cases())
def served(
    request: pytest.FixtureRequest,
    tiny_models: TinyModels,
    oracles: dict[str, Oracle],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Served]:
    case: Case = request.param
    if case.family not in oracles:
        oracles[case.family] = make_oracle(tiny_models, case.family)
    oracle = oracles[case.family]
    lora_paths = [f"{kind}={path}" for kind, path in oracle.paths.items() if kind]
    with running_server(
        tiny_models.model(case.family),
        *("--tp-size", case.tp, "--lora-sharding", case.sharding, "--chunked-prefill-size", case.chunk),
        *("--max-total-tokens", 4096, "--dtype", "float32", "--lora-paths", *lora_paths),
        device=case.device,
        log_dir=tmp_path_factory.mktemp("logs"),
    ) as server:
        yield Served(case, server, oracle)


def make_oracle(tiny_models: TinyModels, family: str) -> Oracle:
    reference = Reference(tiny_models.model(family))
    paths = {kind: tiny_models.adapter(family, kind) if kind else None for kind in KINDS}
    prompts = clear_prompts(
        reference, list(paths.values()), lengths=PROMPT_LENGTHS, num_tokens=NUM_TOKENS, seed=7
    )
    return Oracle(reference, paths, prompts)


def test_every_adapter_alone_has_the_references_logprobs(served: Served) -> None:
    for number, kind in enumerate(KINDS):
        prompt = served.oracle.prompts[number]
        answer = served.server.generate(
            **greedy(prompt, kind), return_logprob=True, logprob_start_len=0, top_logprobs_num=3
        )
        expected = served.oracle.answer(kind, prompt)
        assert answer["output_ids"] == expected.tokens, kind
        meta = answer["meta_info"]
        assert meta["lora_name"] == kind
        check_logprobs(meta["input_token_logprobs"][1:], prompt[1:], expected.prompt_logprobs(), kind)
        check_logprobs(meta["output_token_logprobs"], expected.tokens, expected.output_logprobs(), kind)
        check_tops(meta["input_top_logprobs"][1:] + meta["output_top_logprobs"], expected, kind)


def test_one_batch_of_all_adapters_hits_or_misses_and_never_differs(served: Served) -> None:
    """The second round finds its prompts cached, but for their last token, each under its own adapter only."""
    served.server.post("/flush_cache", {})
    requests = list(zip(served.oracle.prompts, MIXED, strict=True))
    for cached in (False, True):
        answers = served.server.generate(
            input_ids=[prompt for prompt, _ in requests],
            lora_path=[kind for _, kind in requests],
            sampling_params=SAMPLING,
        )
        for (prompt, kind), answer in zip(requests, answers, strict=True):
            assert answer["output_ids"] == served.oracle.answer(kind, prompt).tokens, (
                kind,
                len(prompt),
                cached,
            )
            assert answer["meta_info"]["cached_tokens"] == (len(prompt) - 1 if cached else 0), (kind, cached)


def test_the_same_prompt_under_every_adapter_shares_nothing(served: Served) -> None:
    served.server.post("/flush_cache", {})
    prompt = served.oracle.prompts[3]
    for kind in KINDS:
        answer = served.server.generate(**greedy(prompt, kind))
        assert answer["output_ids"] == served.oracle.answer(kind, prompt).tokens, kind
        assert answer["meta_info"]["cached_tokens"] == 0, kind


def test_a_prompt_that_forks_in_the_middle_of_a_page_reuses_what_agrees(served: Served) -> None:
    served.server.post("/flush_cache", {})
    prompt = served.oracle.prompts[7]
    served.server.generate(**greedy(prompt, "patterns"))
    fork = prompt[:37] + served.oracle.prompts[9][37:]
    answer = served.server.generate(**greedy(fork, "patterns"))
    assert answer["meta_info"]["cached_tokens"] == 37
    assert answer["output_ids"] == served.oracle.answer("patterns", fork).tokens


def test_at_the_end_every_page_is_accounted_for(served: Served) -> None:
    ledger = served.server.wait_idle()
    assert ledger["pages_free"] + ledger["pages_cached"] + ledger["pages_held"] == ledger["pages_total"]
    assert ledger["pages_held"] == 0
    assert ledger["live_versions"] == len(ADAPTERS)


SAMPLING = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}


def greedy(prompt: list[int], kind: str | None) -> dict[str, Any]:
    return {"input_ids": prompt, "lora_path": kind, "sampling_params": SAMPLING}


def check_logprobs(triples: list[Any], tokens: list[int], expected: list[float], kind: str | None) -> None:
    assert [token for _, token, _ in triples] == tokens, kind
    assert [logprob for logprob, _, _ in triples] == pytest.approx(expected, rel=0, abs=TOLERANCE), kind


def check_tops(tops: list[list[Any]], expected: Answer, kind: str | None) -> None:
    """The logprob of each candidate is the reference's, and none outside is better."""
    assert len(tops) == len(expected.logprobs)
    for candidates, logprobs in zip(tops, expected.logprobs, strict=True):
        values = [value for value, _, _ in candidates]
        best = logprobs.topk(len(candidates)).values.tolist()
        named = [float(logprobs[token]) for _, token, _ in candidates]
        assert values == pytest.approx(best, rel=0, abs=TOLERANCE), kind
        assert values == pytest.approx(named, rel=0, abs=TOLERANCE), kind
