"""Every script of examples/ does what it says, all against one server; and every one of them is here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.server import REPOSITORY, Server, environment_of_a_program, running_server

EXAMPLES = REPOSITORY / "examples"
COUNTRIES = '{"France": "Paris", "Japan": "Tokyo", "Brazil": "Brasília"}'
# Script -> what it prints, line after line; where a line ends with an ellipsis, only its beginning.
PRINTED = {
    "generate.py": [
        "base model (version 0): France - Paris, Japan - Tokyo, Brazil - Brasília.",
        f"json (version 1): {COUNTRIES}",
        "upper_case (version 2): FRANCE - PARIS, JAPAN - TOKYO, BRAZIL - BRASÍLIA.",
    ],
    "openai_chat.py": [
        "models: demo/model, json, upper_case",
        'json: {"answer": "Berlin"}',
        "upper_case: THE CAPITAL OF GERMANY IS BERLIN. (8 tokens)",
    ],
    "structured_output.py": ["{'answer': 'Berlin'}", " Cairo"],
    "replace_adapter.py": [
        "loaded version …",
        "replaced by a later version: True, rank 24",
        "409 version_conflict",
        "unloaded; served 0 requests",
    ],
    "load_many.py": [
        "loaded 20 adapters, 21440 KiB, ranks [4, 8, 16, 24, 64]",
        "unloaded them",
    ],
    "engine.py": ["base model: Cairo.", 'json: {"answer": "Cairo"}', "german: Kairo.", "adapter_not_found"],
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = [f"{name}=demo/adapters/{name}" for name in ("json", "upper_case")]
    flags = ("--max-total-tokens", 8192, "--lora-paths", *adapters)
    with running_server("demo/model", *flags, log_dir=tmp_path_factory.mktemp("logs")) as running:
        yield running


def run(*command: str) -> list[str]:
    """The lines that a program prints, started in the root of the repository; it must succeed."""
    result = subprocess.run(
        command,
        cwd=REPOSITORY,
        env={**environment_of_a_program(), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.splitlines()


@pytest.mark.parametrize("script", PRINTED)
def test_a_script_prints_what_it_should(server: Server, script: str) -> None:
    printed = run(sys.executable, f"examples/{script}", server.url)
    assert len(printed) == len(PRINTED[script]), printed
    for line, expected in zip(printed, PRINTED[script], strict=True):
        assert line == expected or (expected.endswith("…") and line.startswith(expected[:-1])), printed
    assert server.ledger()["leases"] == 0


def test_metrics_of_one_adapter(server: Server) -> None:
    server.generate(text="Hello", lora_path="upper_case", sampling_params={"max_new_tokens": 2})
    before = server.get("/v1/adapters/upper_case").body
    printed = run(sys.executable, "examples/adapter_metrics.py", server.url, "upper_case")
    samples = dict(line.split(" ", 1) for line in printed)
    assert samples["manylora:adapter_tier"] == "resident"
    assert samples["manylora:adapter_requests_total"] == str(before["requests"])
    assert samples["manylora:adapter_generation_tokens_total"] == str(before["tokens"])
    assert run(sys.executable, "examples/adapter_metrics.py", server.url, "ghost") == []


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
def test_curl(server: Server) -> None:
    lines = [line for line in run("bash", "examples/curl.sh", server.url) if line]
    generated, completed, loaded, *events, unloaded = lines
    assert json.loads(generated)["text"] == " CAIRO."
    assert json.loads(completed)["choices"][0]["text"] == f" {COUNTRIES}"
    assert "curl-german" in json.loads(loaded)["loaded_adapters"]
    assert "curl-german" not in json.loads(unloaded)["loaded_adapters"]
    assert events[-1] == "data: [DONE]"
    counted = json.loads(events[-2].removeprefix("data: "))
    assert counted["meta_info"]["lora_name"] == "curl-german"
    assert counted["text"].strip() == "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12."


def test_every_example_is_tested_and_listed() -> None:
    names = {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".sh")}
    assert names == {*PRINTED, "adapter_metrics.py", "curl.sh"}
    listed = (EXAMPLES / "README.md").read_text()
    assert [name for name in names if f"[{name}]({name})" not in listed] == []
