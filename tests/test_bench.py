"""The benchmarks run: not how fast anything is, but that they measure the rows they are asked for and draw them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.server import REPOSITORY, environment_of_a_program

SVG = "{http://www.w3.org/2000/svg}"


def run_script(name: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, f"scripts/{name}.py", *args],
        cwd=REPOSITORY,
        env=environment_of_a_program(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two rows of bench_decode on the tiny model, and one that cannot be measured: its window is empty."""
    path = tmp_path_factory.mktemp("bench") / "decode.jsonl"
    tiny = ["--model-shape", "tiny", "--device", "cpu", "--runs", "1", "--json", str(path)]
    done = run_script(
        "bench_decode", *tiny, "--chunked-prefill-size", "64", "--only", "B2K0", "B16K0", "B4K2"
    )
    assert done.returncode == 1, done.stderr
    table = done.stdout.splitlines()[-4:]
    assert [line.split()[0] for line in table] == ["row", "B2K0", "B16K0", "B4K2"]
    assert "no step in which all rows decoded" in table[2]
    return path


def lines_of(path: Path) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {line["row"]: line for line in lines}


def test_rows_are_measured_and_one_that_fails_stops_no_other(results: Path) -> None:
    lines = lines_of(results)
    assert list(lines) == ["B2K0", "B16K0", "B4K2"]
    assert lines["B16K0"]["error"].startswith("ValueError")
    for row, num_adapters in (("B2K0", 0), ("B4K2", 2)):
        line = lines[row]
        assert line["adapters"] == num_adapters
        assert line["step_ms"] > line["floor_ms"] > 0
        [steps] = line["steps"]
        assert 0 < steps < line["new_tokens"]
        assert line["prompt_tokens"] < line["context"] < line["prompt_tokens"] + line["new_tokens"]
        assert line["flags"] == {"device": "cpu", "chunked_prefill_size": 64}


def test_a_picture_is_drawn_of_them(results: Path, tmp_path: Path) -> None:
    picture = tmp_path / "decode.svg"
    done = run_script("plot_bench", str(results), str(picture))
    assert done.returncode == 0, done.stderr
    root = ElementTree.parse(picture).getroot()
    points = root.findall(f"{SVG}circle/{SVG}title")
    assert sorted((title.text or "").split(":")[0] for title in points) == ["B2K0", "B4K2"]


def test_short_steps_are_timed(tmp_path: Path) -> None:
    path = tmp_path / "short.jsonl"
    done = run_script(
        "bench_short_steps", "--model-shape", "tiny", "--runs", "1", "--json", str(path), "--only", "2x5K2"
    )
    assert done.returncode == 0, done.stderr
    line = lines_of(path)["2x5K2"]
    assert (line["prompts"], line["tokens"], line["adapters"]) == (2, 5, 2)
    assert line["one_by_one_ms"] > 0


def test_a_step_alone_is_timed(tmp_path: Path) -> None:
    path = tmp_path / "step.jsonl"
    done = run_script(
        "bench_step",
        "--model-shape",
        "tiny",
        "--runs",
        "2",
        "--json",
        str(path),
        "--only",
        "B3K2r8+24",
        "B2K0",
    )
    assert done.returncode == 0, done.stderr
    lines = lines_of(path)
    found = [(line["batch"], line["ranks"]) for line in lines.values()]
    assert found == [(3, {"8": 1, "24": 1}), (2, {})]
    for line in lines.values():
        assert line["slowest_ms"] == max(line["runs_ms"]) >= line["step_ms"] > line["floor_ms"] > 0
        assert len(line["runs_ms"]) == 2


def test_the_schedulers_own_time_is_measured_with_a_full_cache(tmp_path: Path) -> None:
    path = tmp_path / "scheduler.jsonl"
    sizes = ["--pages", "400", "--steps", "30", "--only", "16x8"]
    done = run_script("bench_scheduler", "--model-shape", "tiny", "--json", str(path), *sizes)
    assert done.returncode == 0, done.stderr
    line = lines_of(path)["16x8"]
    assert line["steps"] == 30
    assert line["free_pages"] < line["pages"] // 20
    assert min(line["p50_ms"], line["mean_ms"], line["tidy_ms"]) > 0
