"""What a real server tells of itself: numbers at `/metrics`, and a log in JSON from its start to its end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.helpers import load_by_next_loader, wait_until
from tests.server import REPOSITORY, Server, free_port, running_server
from tests.test_dashboard import queries

DEMO = REPOSITORY / "demo"
PROMPT = "List 3 countries and their capitals."
ADAPTERS = [f"{name}={DEMO}/adapters/{name}" for name in ("json", "upper_case")]

COUNTS = {  # fields of AdapterState
    "requests": "requests_total",
    "loads": "loads_total",
    "evictions": "evictions_total",
    "hits": "hits_total",
    "queue_s": "queue_seconds_total",
    "tokens": "generation_tokens_total",
    "running": "requests_running",
    "waiting": "requests_waiting",
}


def samples(server: Server) -> dict[str, float]:
    """`name{label="value",…}` -> value of every sample."""
    reply = server.get("/metrics")
    assert reply.status == 200
    return {
        s.name + "{" + ",".join(f'{k}="{v}"' for k, v in sorted(s.labels.items())) + "}": s.value
        for family in text_string_to_metric_families(reply.body)
        for s in family.samples
    }


def ask(server: Server, **fields: Any) -> Any:
    params = {"temperature": 0, "max_new_tokens": 16, "ignore_eos": True}
    return server.generate(
        text=[PROMPT] * 3, lora_path=["json", None, "json"], sampling_params=params, **fields
    )


def test_a_server_tells_what_it_did(tmp_path: Path) -> None:
    with running_server(
        DEMO / "model", "--lora-paths", *ADAPTERS, "--max-loras-per-batch", 3, log_dir=tmp_path
    ) as server:
        before = samples(server)
        assert before["manylora:generation_tokens_total{}"] == 0  # the warm-up is nobody's
        answers = [one["meta_info"] for _ in range(2) for one in ask(server)]
        wait_until(lambda: samples(server)["manylora:e2e_request_latency_seconds_count{}"] == 6, "six ends")
        page, told = samples(server), server.ledger()["adapters"]
    assert page["manylora:generation_tokens_total{}"] == 96
    assert page["manylora:prompt_tokens_total{}"] == sum(one["prompt_tokens"] for one in answers)
    assert page["manylora:prompt_tokens_cached_total{}"] == sum(one["cached_tokens"] for one in answers) > 0
    assert page['manylora:requests_finished_total{finish_reason="length"}'] == 6
    assert page["manylora:time_to_first_token_seconds_count{}"] == 6
    assert page["manylora:inter_token_latency_seconds_count{}"] == 90
    assert page["manylora:e2e_request_latency_seconds_sum{}"] == pytest.approx(
        sum(one["e2e_latency"] for one in answers), rel=0.2
    )
    queued = page["manylora:request_queue_time_seconds_sum{}"]
    assert 0 < queued < page["manylora:time_to_first_token_seconds_sum{}"]
    assert page["manylora:steps_total{}"] > before["manylora:steps_total{}"]
    pages = {
        use: page[f'manylora:num_pages{{use="{use}"}}'] for use in ("free", "kv_cached", "adapter_cached")
    }
    assert min(pages.values()) > 0
    assert page['manylora:adapter_tier{adapter="json",tier="resident"}'] == 1
    assert page['manylora:adapter_pages{adapter="json"}'] == pages["adapter_cached"]
    assert page['manylora:adapter_tier{adapter="upper_case",tier="host"}'] == 1
    for one in told:
        for field, metric in COUNTS.items():
            sample = f'manylora:adapter_{metric}{{adapter="{one["lora_name"]}"}}'
            assert page[sample] == pytest.approx(one[field], abs=1e-6), sample
    ready = 'max_lora="3",running_lora_adapters="json",waiting_lora_adapters=""'
    assert page[f"vllm:lora_requests_info{{{ready}}}"] == pytest.approx(time.time(), abs=60)


def log_objects(server: Server) -> list[dict[str, Any]]:
    """Every line of the log; fails where one is no object with what each must have."""
    lines = [json.loads(line) for line in server.log().splitlines()]
    for line in lines:
        assert {"time", "process", "level", "logger", "event"} <= line.keys(), line
    return lines


def test_every_line_of_a_json_log_is_an_object(tmp_path: Path) -> None:
    with running_server(
        DEMO / "model", "--lora-paths", ADAPTERS[0], "--log-format", "json", "--tp-size", 2, log_dir=tmp_path
    ) as server:
        ask(server, rid=["one", "two", "three"])
        assert list(server.stream(text=PROMPT, rid="streamed", sampling_params={"max_new_tokens": 3}))
        assert (
            server.post("/generate", {"text": PROMPT, "lora_path": "unknown", "rid": "re\nfused"}).status
            == 400
        )
        assert server.get("/nowhere?key=secret").status == 404
        assert server.load("german", DEMO / "adapters/german").status == 200
        assert server.load("nothing", tmp_path).status == 400
        server.get("/metrics")
        os.kill(server.children()["loader"], signal.SIGKILL)
        wait_until(lambda: "it is started again" in server.log(), "a new loader")
        load_by_next_loader(server, "upper_case", DEMO / "adapters/upper_case")
    lines = log_objects(server)
    access = [line for line in lines if line["logger"] == "manylora.access"]
    assert {line["process"] for line in lines} == {"supervisor", "front", "scheduler"}
    generated = [(one["request_id"], one["status"]) for one in access if one["path"] == "/generate"]
    assert generated == [("one and 2 more", 200), ("streamed", 200), ("re\nfused", 400)]
    assert [one["status"] for one in access if one["path"] == "/nowhere"] == [404]
    assert "secret" not in server.log()
    assert not [one for one in access if one["path"] == "/metrics"]
    assert all("request_id" not in one for one in access if one["path"] != "/generate")
    [killed] = [line for line in lines if "it is started again" in line["event"]]
    assert (killed["level"], killed["process"]) == ("warning", "supervisor")
    assert [line for line in lines if line["event"].startswith("LoRA adapter loaded: german")]
    assert [line["process"] for line in lines if line["event"] == "shutting down"] == ["supervisor"]


def test_a_start_that_fails_says_why_in_json(tmp_path: Path) -> None:
    server = Server(["--model-path", str(tmp_path), "--log-format", "json"], tmp_path / "log")
    try:
        assert server.wait_exit(60) == 1
    finally:
        server.stop()
    last = log_objects(server)[-1]
    assert (last["level"], last["code"]) == ("critical", "model_not_found")
    assert str(tmp_path) in last["event"]


# ---- a real Prometheus ----------------------------------------------------------------------------------------------


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[Any]:
    """Starts a Prometheus that scrapes a port five times a second; gives a function that asks it."""
    program = shutil.which("prometheus")
    if program is None:
        pytest.skip("there is no prometheus; Debian's package of that name has one")
    port = free_port()
    started: list[subprocess.Popen[bytes]] = []

    def start(target: int) -> Any:
        config = {
            "global": {"scrape_interval": "200ms", "scrape_timeout": "200ms"},
            "scrape_configs": [
                {"job_name": "manylora", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]}
            ],
        }
        (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        with (tmp_path / "prometheus.log").open("wb") as log:
            command = [program, "--config.file=prometheus.yml", f"--web.listen-address=127.0.0.1:{port}"]
            started.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log))
        return lambda query: ask_prometheus(port, query)

    yield start
    for process in started:
        process.terminate()
        process.wait(20)


def ask_prometheus(port: int, query: str) -> list[Any]:
    """The result of an instant query; none while it is not up."""
    url = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        if error.code == 503:
            return []
        raise AssertionError(f"{query}: {error.read()!r}") from error
    except OSError:
        return []
    assert answer["status"] == "success", answer
    return answer["data"]["result"]


@pytest.mark.slow
def test_prometheus_scrapes_and_answers_the_dashboards_queries(prometheus: Any, tmp_path: Path) -> None:
    dashboard = json.loads((REPOSITORY / "docs/grafana.json").read_text())
    with running_server(DEMO / "model", "--lora-paths", *ADAPTERS, log_dir=tmp_path) as server:
        query = prometheus(server.port)
        wait_until(lambda: query("up == 1"), "a scrape")
        for _ in range(5):
            ask(server)
            server.post("/generate", {"text": PROMPT, "lora_path": "unknown"})
            time.sleep(0.5)
        time.sleep(1)
        empty = [expr for expr in queries(dashboard) if not query(expr)]
        assert query("manylora:generation_tokens_total")[0]["value"][1] == "240"
        assert query('{__name__="vllm:lora_requests_info"}')
        assert not [one for one in query('{job="manylora"}') if "manylora_" in one["metric"]["__name__"]]
    # Nothing has ended in an error.
    assert [expr for expr in empty if "requests_failed" not in expr] == []
