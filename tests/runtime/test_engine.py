"""`Engine` on the demo model: every method, streams, refusals, and that nothing is left."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from manylora import Engine
from manylora.runtime.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    ShuttingDownError,
    WorkerCrashedError,
)
from manylora.runtime.sampling_params import SamplingParams

DEMO = Path(__file__).resolve().parents[2] / "demo"
FRANCE = "The capital of France is"
SHORT: dict[str, Any] = {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}
ENDLESS: dict[str, Any] = {"temperature": 0, "max_new_tokens": 2000, "ignore_eos": True}


def start_engine() -> Engine:
    return Engine(str(DEMO / "model"), device="cpu", lora_paths={"json": str(DEMO / "adapters/json")})


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with start_engine() as engine:
        yield engine


def test_one_and_many(engine: Engine) -> None:
    answer = engine.generate(FRANCE, SHORT)
    assert answer["text"].startswith(" Paris")
    assert answer["meta_info"]["finish_reason"] == {"type": "length", "length": 4}
    assert engine.generate(prompt=FRANCE, sampling_params=SHORT)["output_ids"] == answer["output_ids"]
    assert engine.generate(FRANCE, SamplingParams(**SHORT))["output_ids"] == answer["output_ids"]
    both = engine.generate([FRANCE, FRANCE], SHORT, lora_path=["json", None])
    assert [one["meta_info"]["lora_name"] for one in both] == ["json", None]
    assert both[1]["output_ids"] == answer["output_ids"] != both[0]["output_ids"]


def test_logprobs(engine: Engine) -> None:
    answer = engine.generate(FRANCE, SHORT, return_logprob=True, logprob_start_len=0, top_logprobs_num=2)
    meta = answer["meta_info"]
    assert len(meta["input_token_logprobs"]) == meta["prompt_tokens"]
    assert meta["input_token_logprobs"][0][0] is None
    assert [triple[1] for triple in meta["output_token_logprobs"]] == answer["output_ids"]
    for (logprob, token, _), best in zip(
        meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True
    ):
        assert best[0][:2] == (logprob, token)  # greedy


def test_stream(engine: Engine) -> None:
    parts = list(engine.generate(FRANCE, SHORT, stream=True))
    assert parts[-1]["output_ids"] == engine.generate(FRANCE, SHORT)["output_ids"]
    assert all(parts[-1]["text"].startswith(part["text"]) for part in parts)
    running = engine.generate([FRANCE, FRANCE], ENDLESS, stream=True)
    assert next(running)["index"] in (0, 1)
    running.close()
    assert engine.generate(FRANCE, SHORT)  # an Abort went out before it
    assert (engine.state().running, engine.state().leases) == (0, 0)


def test_adapters(engine: Engine) -> None:
    path = str(DEMO / "adapters/upper_case")
    assert list(engine.load_lora_adapter("upper", path, pinned=True)) == ["json", "upper"]
    with pytest.raises(AdapterExistsError):
        engine.load_lora_adapter("upper", path)
    engine.load_lora_adapter("upper", path, replace=True)
    assert engine.generate(FRANCE, SHORT, lora_path="upper")["meta_info"]["lora_version"] == 3
    assert list(engine.unload_lora_adapter("upper")) == ["json"]
    with pytest.raises(AdapterNotFoundError):
        engine.generate(FRANCE, SHORT, lora_path="upper")


def test_refusals_are_exceptions(engine: Engine) -> None:
    with pytest.raises(BadRequestError, match=r"Expected `int \| null`, got `str`"):
        engine.generate(FRANCE, {"max_new_tokens": "4"})
    with pytest.raises(BadRequestError, match="unknown field `tmp`"):
        engine.generate(FRANCE, {"tmp": 1})
    with pytest.raises(BadRequestError, match="two names of one"):
        engine.generate(FRANCE, SHORT, prompt=FRANCE)
    with pytest.raises(ContextLengthError):
        engine.generate(input_ids=[5] * 5000)


def test_server_info(engine: Engine) -> None:
    engine.flush_cache()
    info = engine.get_server_info()
    assert (info["device"], info["tp_size"]) == ("cpu", 1)
    [ledger] = info["internal_states"]
    assert ledger["pages_free"] + ledger["pages_cached"] + ledger["pages_held"] == ledger["pages_total"]


def test_a_dead_worker_ends_what_waits_and_shutdown_ends_the_rest() -> None:
    others = worker_pids()
    engine = start_engine()
    running = engine.generate(FRANCE, ENDLESS, stream=True)
    next(running)
    [worker] = worker_pids() - others
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(WorkerCrashedError, match="worker0"):
        list(running)
    with pytest.raises(WorkerCrashedError):
        engine.generate(FRANCE, SHORT)
    engine.shutdown()
    engine.shutdown()
    with pytest.raises(ShuttingDownError):
        engine.generate(FRANCE, SHORT)


def test_a_start_that_fails_says_why() -> None:
    with pytest.raises(ConfigError, match="no_such_flag"):
        Engine(str(DEMO / "model"), no_such_flag=1)
    with pytest.raises(ConfigError, match="nowhere"):
        Engine("/nowhere/at/all")


def worker_pids() -> set[int]:
    """Of every engine of this process."""
    found: set[int] = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"manylora.tp_worker.worker" in (entry / "cmdline").read_bytes():
                found.add(int(entry.name))
    return found
