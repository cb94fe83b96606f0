"""`Engine`: the same server in a Python program, without HTTP."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from manylora import Engine
from manylora.runtime.errors import (
    AdapterExistsError,
    AdapterNotFoundError,
    BadRequestError,
    ConfigError,
    ContextLengthError,
    ModelNotFoundError,
)
from tests.conftest import processes_of_this_run
from tests.reference import Reference, clear_prompts
from tests.server import environment_of_a_program
from tests.tiny_models import TinyModels

GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
KINDS = ("r4_qv", "r64_all")


@pytest.fixture(scope="module")
def run_dir_base() -> Iterator[Path]:
    """Where the engines of this module keep their sockets; empty at the end."""
    with (
        tempfile.TemporaryDirectory(prefix="mlt-", dir="/tmp") as base,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setenv("XDG_RUNTIME_DIR", base)
        yield Path(base)
        assert not list(Path(base).iterdir())


@pytest.fixture(scope="module")
def engine(tiny_models: TinyModels, run_dir_base: Path) -> Iterator[Engine]:
    lora_paths = {kind: str(tiny_models.adapter("llama", kind)) for kind in KINDS}
    with Engine(
        model_path=str(tiny_models.model("llama")), device="cpu", tp_size=2, lora_paths=lora_paths
    ) as engine:
        [config] = run_dir_base.glob("manylora-*/scheduler.0.json")
        shm_dir = Path(json.loads(config.read_text())["shm_dir"])
        yield engine
    assert not shm_dir.exists()
    assert not processes_of_this_run()


def test_generate_answers_as_the_reference(engine: Engine, tiny_models: TinyModels) -> None:
    reference = Reference(tiny_models.model("llama"))
    paths = [None, *(tiny_models.adapter("llama", kind) for kind in KINDS)]
    [prompt] = clear_prompts(reference, paths, lengths=[20], num_tokens=8, seed=9)
    answers = engine.generate(input_ids=[prompt] * 3, sampling_params=GREEDY, lora_path=[None, *KINDS])
    expected = [reference.generate(path, prompt, 8).tokens for path in paths]
    assert [answer["output_ids"] for answer in answers] == expected


def test_a_text_gets_one_answer_and_a_stream_the_same(engine: Engine) -> None:
    whole = engine.generate("The capital of France", GREEDY, lora_path="r4_qv")
    events = list(engine.generate("The capital of France", GREEDY, lora_path="r4_qv", stream=True))
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["meta_info"]["finish_reason"] == {"type": "length", "length": 8}


def test_threads_share_an_engine(engine: Engine) -> None:
    expected = {kind: engine.generate("France", GREEDY, lora_path=kind)["text"] for kind in KINDS}
    answers: list[tuple[str, str]] = []

    def ask(kind: str) -> None:
        answers.append((kind, engine.generate("France", GREEDY, lora_path=kind)["text"]))

    threads = [threading.Thread(target=ask, args=(kind,)) for kind in KINDS * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(answers) == sorted(list(expected.items()) * 4)


def test_a_stream_that_is_closed_is_aborted(engine: Engine) -> None:
    stream = engine.generate("France", {**GREEDY, "max_new_tokens": 400}, stream=True)
    next(stream)
    assert engine.state().running == 1
    stream.close()
    engine.flush_cache()  # refused while anything runs
    assert engine.state().pages_held == 0


def test_adapters_are_loaded_replaced_and_unloaded(engine: Engine, tiny_models: TinyModels) -> None:
    path = str(tiny_models.adapter("llama", "rslora"))
    assert list(engine.load_lora_adapter("new", path)) == [*KINDS, "new"]
    first = engine.generate("France", GREEDY, lora_path="new")
    with pytest.raises(AdapterExistsError, match="new"):
        engine.load_lora_adapter("new", path)
    engine.load_lora_adapter("new", str(tiny_models.adapter("llama", "r16_all")), replace=True)
    second = engine.generate("France", GREEDY, lora_path="new")
    assert second["text"] != first["text"]
    assert second["meta_info"]["lora_version"] > first["meta_info"]["lora_version"]
    assert list(engine.unload_lora_adapter("new")) == list(KINDS)
    with pytest.raises(AdapterNotFoundError, match="new"):
        engine.generate("France", GREEDY, lora_path="new")


def test_refusals_are_typed(engine: Engine) -> None:
    with pytest.raises(ContextLengthError):
        engine.generate("France", {"max_new_tokens": 10_000})
    with pytest.raises(BadRequestError, match="temperature"):
        engine.generate("France", {"temperature": -1})
    with pytest.raises(ConfigError, match="tp_sise"):
        Engine(model_path="/nowhere", tp_sise=2)
    with pytest.raises(ModelNotFoundError, match="/nowhere"):
        Engine(model_path="/nowhere", device="cpu")


def test_a_program_that_forgets_shutdown_ends_and_leaves_nothing(
    tiny_models: TinyModels, run_dir_base: Path
) -> None:
    program = (
        "from manylora import Engine\n"
        f"engine = Engine(model_path={str(tiny_models.model('llama'))!r}, device='cpu')\n"
        "print(engine.generate('France', {'max_new_tokens': 2})['meta_info']['completion_tokens'])\n"
    )
    before = set(run_dir_base.iterdir())
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment_of_a_program(),
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert (done.returncode, done.stdout) == (0, "2\n"), done.stderr
    assert set(run_dir_base.iterdir()) == before
