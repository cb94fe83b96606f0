"""The two documents this server is a drop-in for, cell by cell: their launch lines, their requests, what they show.

The model and the adapters are the demo's where they are there, else tiny ones of the same kinds; the texts to expect
come from transformers + PEFT. The hub names of the documents stand in the launch lines as they were written. Their
cells that end a server are every `with`: `running_server` demands that nothing is left.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import transformers

from tests.e2e.helpers import ONE_DEVICE, wait_until
from tests.reference import Reference
from tests.server import REPOSITORY, Server, running_server
from tests.tiny_models import TinyModels

MODEL = "meta-llama/Meta-Llama-3.1-8B-Instruct"
A64 = "algoprog/fact-generation-llama-3.1-8b-instruct-lora"
N4 = "Nutanix/Meta-Llama-3.1-8B-Instruct_lora_4_alpha_16"
S256 = "philschmid/code-llama-3-1-8b-text-to-sql-lora"
LIST = "List 3 countries and their capitals."
AI = "AI is a field of computer science focused on"
GREEDY = {"max_new_tokens": 32, "temperature": 0}
LAUNCHER_FLAGS = "--max-running-requests 128 --max-total-tokens 20480 --cuda-graph-max-bs 4"


@dataclass(frozen=True)
class Stage:
    """The actors: where each hub name of the documents lies here, and the oracle of what each says."""

    paths: dict[str, Path]
    reference: Reference
    tokenizer: Any
    device: str
    log_dir: Path

    def launch(self, cell: str) -> AbstractContextManager[Server]:
        """Run a cell's command as the documents' launcher does: no shell, backslashes to blanks, split at blanks."""
        words = cell.replace("\\", " ").split() + LAUNCHER_FLAGS.split()
        assert words[:3] == ["python3", "-m", "sglang.launch_server"]
        for hub_name, path in self.paths.items():
            words = [word.replace(hub_name, str(path)) for word in words]
        assert words[3] == "--model-path"
        flags = (*words[5:], "--dtype", "float32")  # as the reference
        return running_server(words[4], *flags, device=self.device, log_dir=self.log_dir)

    def text(self, adapter: str | None, prompt: str) -> str:
        """What transformers + PEFT answer."""
        stop_ids = transformers.GenerationConfig.from_pretrained(self.paths[MODEL]).eos_token_id
        answer = self.reference.generate(
            self.paths[adapter] if adapter else None,
            self.tokenizer(prompt)["input_ids"],
            GREEDY["max_new_tokens"],
            stop_ids=stop_ids if isinstance(stop_ids, list) else [stop_ids],
        )
        return self.tokenizer.decode(answer.tokens, skip_special_tokens=True)

    def prompt_tokens(self, prompt: str) -> int:
        return len(self.tokenizer(prompt)["input_ids"])


@pytest.fixture(scope="module", params=ONE_DEVICE)
def stage(
    request: pytest.FixtureRequest, tiny_models: TinyModels, tmp_path_factory: pytest.TempPathFactory
) -> Stage:
    paths = actors(tiny_models)
    return Stage(
        paths,
        Reference(paths[MODEL]),
        transformers.AutoTokenizer.from_pretrained(paths[MODEL]),
        request.param,
        tmp_path_factory.mktemp("logs"),
    )


def actors(tiny_models: TinyModels) -> dict[str, Path]:
    """Hub name -> directory."""
    demo = REPOSITORY / "demo"
    if (demo / "model" / "config.json").exists():
        return {MODEL: demo / "model"} | {
            name: demo / "adapters" / own for name, own in DEMO_ADAPTERS.items()
        }
    kinds = {A64: "r64_all", N4: "r4_qv", S256: "patterns"}
    adapters = {name: tiny_models.adapter("llama", kind) for name, kind in kinds.items()}
    return {MODEL: tiny_models.model("llama"), **adapters}


DEMO_ADAPTERS = {A64: "one_per_line", N4: "upper_case", S256: "json"}


def ask(server: Server, prompts: list[str], names: list[str | None]) -> list[Any]:
    """The documents' request: a list of texts, one adapter name each."""
    answers = server.generate(text=prompts, sampling_params=GREEDY, lora_path=names)
    assert len(answers) == len(prompts)
    return answers


def texts(answers: list[Any]) -> list[str]:
    return [answer["text"] for answer in answers]


def ran_together(server: Server, steps_before: int, answers: list[Any]) -> bool:
    """Whether the answers shared their steps: one after the other they would need as many steps as tokens."""
    longest = max(answer["meta_info"]["completion_tokens"] for answer in answers)
    return server.ledger()["steps"] - steps_before < longest + 8


# ---- the older document -----------------------------------------------------------------------------------------------


def test_old_single_adapter(stage: Stage) -> None:
    """Cells old-1 and old-2: --lora-paths alone switches LoRA on, adapter and base in one call."""
    cell = f"""
python3 -m sglang.launch_server --model-path {MODEL} \\
 --lora-paths lora0={A64} \\
 --max-loras-per-batch 1 --lora-backend triton \\
 --disable-radix-cache
"""
    with stage.launch(cell) as server:
        for _ in range(2):
            answers = ask(server, [LIST, AI], ["lora0", None])
            assert texts(answers) == [stage.text(A64, LIST), stage.text(None, AI)]
            assert [answer["meta_info"]["cached_tokens"] for answer in answers] == [0, 0]


def test_old_two_adapters_in_one_batch(stage: Stage) -> None:
    """Cell old-3."""
    cell = f"""
python3 -m sglang.launch_server --model-path {MODEL} \\
 --lora-paths lora0={A64} \\
 lora1={N4} \\
 --max-loras-per-batch 2 --lora-backend triton \\
 --disable-radix-cache
"""
    with stage.launch(cell) as server:
        answers = ask(server, [LIST, AI], ["lora0", "lora1"])
        assert texts(answers) == [stage.text(A64, LIST), stage.text(N4, AI)]


# ---- the newer document -----------------------------------------------------------------------------------------------


def test_single_adapter_never_shares_its_cache(stage: Stage) -> None:
    """Cells 2, 3 and 4: the same prompt under an adapter and under the base, then a clean end."""
    cell = f"""
python3 -m sglang.launch_server --model-path {MODEL} \\
    --enable-lora \\
    --lora-paths lora0={A64} \\
    --max-loras-per-batch 1 --lora-backend triton \\
"""
    with stage.launch(cell) as server:
        assert server.get("/v1/models").status == 200
        assert server.get("/get_model_info").body["model_path"] == str(stage.paths[MODEL])
        wait_until(lambda: "ready at http://" in server.log(), "the line that tells the address")
        answers = ask(server, [LIST, LIST], ["lora0", None])
        assert texts(answers) == [stage.text(A64, LIST), stage.text(None, LIST)]
        adapter, base = (answer["meta_info"]["cached_tokens"] for answer in answers)
        assert adapter == 0
        assert base <= 1  # BOS at most, which the warm-up may have left
        again = ask(server, [LIST, LIST], ["lora0", None])
        assert texts(again) == texts(answers)
        cached = stage.prompt_tokens(LIST) - 1
        assert [answer["meta_info"]["cached_tokens"] for answer in again] == [cached, cached]


def test_two_adapters_run_together(stage: Stage) -> None:
    """Cells 5, 6 and 7."""
    cell = f"""
python3 -m sglang.launch_server --model-path {MODEL} \\
    --enable-lora \\
    --lora-paths lora0={A64} \\
    lora1={N4} \\
    --max-loras-per-batch 2 --lora-backend triton \\
"""
    with stage.launch(cell) as server:
        steps = server.ledger()["steps"]
        answers = ask(server, [LIST, LIST], ["lora0", "lora1"])
        assert texts(answers) == [stage.text(A64, LIST), stage.text(N4, LIST)]
        assert ran_together(server, steps, answers)


def test_adapters_come_change_and_go_while_it_runs(stage: Stage) -> None:
    """Cells 8 to 14. The line break after the rank has no backslash in the document either."""
    cell = f"""
    python3 -m sglang.launch_server --model-path {MODEL} \\
    --enable-lora \\
    --cuda-graph-max-bs 2 \\
    --max-loras-per-batch 2 --lora-backend triton \\
    --max-lora-rank 256
    --lora-target-modules all
    """
    n4, a64, s256 = (str(stage.paths[name]) for name in (N4, A64, S256))
    with stage.launch(cell) as server:
        assert loaded(server.load("lora0", stage.paths[N4])) == [("lora0", n4)]
        assert loaded(server.load("lora1", stage.paths[A64])) == [("lora0", n4), ("lora1", a64)]
        answers = ask(server, [LIST, LIST], ["lora0", "lora1"])
        assert texts(answers) == [stage.text(N4, LIST), stage.text(A64, LIST)]
        first_version = answers[0]["meta_info"]["lora_version"]

        assert loaded(server.unload("lora0")) == [("lora1", a64)]
        assert loaded(server.load("lora0", stage.paths[S256])) == [("lora1", a64), ("lora0", s256)]
        answers = ask(server, [LIST, LIST], ["lora0", "lora1"])
        assert texts(answers) == [stage.text(S256, LIST), stage.text(A64, LIST)]
        cached = [answer["meta_info"]["cached_tokens"] for answer in answers]
        assert cached == [0, stage.prompt_tokens(LIST) - 1]
        assert answers[0]["meta_info"]["lora_version"] != first_version


def test_pinned_adapters_in_every_form_of_the_list(stage: Stage) -> None:
    """Cells 15 to 18, and the limit that the text states: all but one may be pinned."""
    cell = f"""
    python3 -m sglang.launch_server --model-path {MODEL} \\
    --enable-lora \\
    --cuda-graph-max-bs 8 \\
    --max-loras-per-batch 3 --lora-backend triton \\
    --max-lora-rank 256 \\
    --lora-target-modules all \\
    --lora-paths \\
        {{"lora_name":"lora0","lora_path":"{N4}","pinned":true}} \\
        {{"lora_name":"lora1","lora_path":"{A64}"}} \\
        lora2={S256}
    """
    with stage.launch(cell) as server:
        assert [name for name, _ in loaded(server.unload("lora1"))] == ["lora0", "lora2"]
        reply = server.load("lora1", stage.paths[A64], pinned=True)
        assert [name for name, _ in loaded(reply)] == ["lora0", "lora2", "lora1"]
        steps = server.ledger()["steps"]
        answers = ask(server, [LIST] * 3, ["lora0", "lora1", "lora2"])
        assert texts(answers) == [stage.text(name, LIST) for name in (N4, A64, S256)]
        assert ran_together(server, steps, answers)
        refused = server.load("lora3", stage.paths[A64], pinned=True)
        assert (refused.status, refused.body["success"]) == (400, False)
        assert "pin" in refused.body["error_message"]


def loaded(reply: Any) -> list[tuple[str, str]]:
    """(name, path) in load order, from a reply that must be exactly the documents'."""
    assert reply.status == 200, reply
    assert set(reply.body) == {"success", "error_message", "loaded_adapters"}
    assert (reply.body["success"], reply.body["error_message"]) == (True, "")
    return list(reply.body["loaded_adapters"].items())
