"""`/metrics` over HTTP: formats, what is counted of HTTP itself, and the protocol of the Kubernetes gateways."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text

from manylora.runtime.config import LoRAArgs, ModelArgs, ServerConfig
from manylora.runtime.errors import NonFiniteLogitsError
from manylora.runtime.http.metrics_routes import MetricsPage
from manylora.runtime.messages import AdapterState, State
from manylora.runtime.metrics import MAX_LISTED_ADAPTERS, gateway_families, scheduler_families
from tests.runtime.http_front import HttpFront, served
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, in_loop, server_info, until
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

OPENMETRICS = "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.3"
DOCUMENT = Path(__file__).resolve().parent.parent.parent / "docs/metrics.md"


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


def values(families: Iterable[Metric]) -> dict[str, float]:
    """`name{label="value",…}` -> value of every sample."""
    return {
        s.name + "{" + ",".join(f'{k}="{v}"' for k, v in sorted(s.labels.items())) + "}": s.value
        for family in families
        for s in family.samples
    }


async def scrape(front: HttpFront) -> dict[str, float]:
    """A page that was made after the call."""
    await asyncio.sleep(0.2)  # no page of these tests costs so much that it is kept for longer
    status, text = await front.get("/metrics")
    assert status == 200
    return values(parse_text(text))


def lora_config(**lora: object) -> ServerConfig:
    return ServerConfig(model=ModelArgs(model_path="m"), lora=LoRAArgs(**lora))  # type: ignore[arg-type]


def adapter(name: str, tier: str, waiting: int = 0, last_use: float = 0.0) -> AdapterState:
    return AdapterState(name, "/path", 1, "", False, tier, 8, 5, 0, waiting=waiting, last_use=last_use)


def state_with(*adapters: AdapterState, **fields: int) -> State:
    state = State(1, 3, 2, 0, 100, 50, 30, 20, 9, 4, 9, 9, 1, 7, 1, list(adapters))
    return msgspec.structs.replace(state, **fields)


# ---- the page -----------------------------------------------------------------------------------------------------


@in_loop
async def test_both_formats_say_the_same(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        await front.post("/generate", {"text": "Paris.", "sampling_params": {"max_new_tokens": 3}})
        async with front.client.get("/metrics") as plain:
            assert plain.headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
            text = await plain.text()
        async with front.client.get("/metrics", headers={"Accept": OPENMETRICS}) as response:
            assert response.headers["Content-Type"].startswith("application/openmetrics-text; version=1.0.0")
            openmetrics = await response.text()
        assert openmetrics.endswith("# EOF\n")
        said, said_openly = values(parse_text(text)), values(parse_openmetrics(openmetrics))
        of_http = 'manylora:http_responses_total{handler="/metrics",method="GET",status="2xx"}'
        assert (said.pop(of_http, 0), said_openly.pop(of_http)) == (0, 1)
        assert said == said_openly
        assert said["manylora:generation_tokens_total{}"] == 3
        assert said['manylora:requests_finished_total{finish_reason="length"}'] == 1
        assert said['manylora:time_to_first_token_seconds_bucket{le="+Inf"}'] == 1


@in_loop
async def test_names_of_adapters_survive(tokenizer_dir: Path) -> None:
    name = 'a "quoted\\ nämé", x=1}'
    async with served(tokenizer_dir) as front:
        await front.post("/load_lora_adapter", {"lora_name": name, "lora_path": "p"})
        page = await scrape(front)
        assert page[f'manylora:adapter_tier{{adapter="{name}",tier="host"}}'] == 1
        await front.post("/unload_lora_adapter", {"lora_name": name})
        assert not [key for key in await scrape(front) if "nämé" in key]


@in_loop
async def test_scrapes_at_once_cost_one(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        page = MetricsPage(front.state, {})
        pages = await asyncio.gather(*(page.render("") for _ in range(50)))
        asked = [m for m in front.scheduler.received if type(m).__name__ == "GetState"]
        assert len(asked) == 1
        assert len({body for body, _ in pages}) == 1


@in_loop
async def test_responses_are_counted_by_route_and_status(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        await front.get("/health")
        await front.post("/generate", {"text": "Paris.", "sampling_params": {"max_new_tokens": 3}})
        await front.events({"text": "Paris.", "sampling_params": {"max_new_tokens": 3}})
        await front.post("/generate", {"nonsense": 1})
        await front.get("/generate")
        for stranger in ("/x", "/y?z=1", "/generate/../z"):
            await front.get(stranger)
        async with front.client.request("PROPFIND", "/pot"):
            pass
        front.scheduler.held = True
        leaving = asyncio.create_task(front.post("/generate", {"text": "Paris."}))
        await until(lambda: front.scheduler.running)
        leaving.cancel()
        await until(lambda: front.scheduler.aborted)
        page = await scrape(front)
        prefix = "manylora:http_responses_total"
        counted = {key.removeprefix(prefix): n for key, n in page.items() if key.startswith(prefix)}
        assert counted == {
            '{handler="/health",method="GET",status="2xx"}': 1,
            '{handler="/generate",method="POST",status="2xx"}': 2,
            '{handler="/generate",method="POST",status="4xx"}': 1,
            '{handler="/generate",method="POST",status="cancelled"}': 1,
            '{handler="other",method="GET",status="4xx"}': 4,
            '{handler="other",method="other",status="4xx"}': 1,
        }
        assert page['manylora:requests_finished_total{finish_reason="abort"}'] == 1


@in_loop
async def test_before_the_start_there_is_nothing_to_tell(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir, started=False) as front:
        status, answer = await front.get("/metrics")
        assert (status, answer["error"]["code"]) == (503, "not_ready")


# ---- what the scheduler holds ---------------------------------------------------------------------------------------


def test_pages_are_told_by_use(tokenizer_dir: Path) -> None:
    state = state_with(pages_kv=35, pages_kv_cached=20, pages_adapters=15)
    page = values(scheduler_families(state, lora_config(), server_info(tokenizer_dir)))
    pages = {key: value for key, value in page.items() if key.startswith("manylora:num_pages")}
    assert pages == {
        'manylora:num_pages{use="free"}': 50,
        'manylora:num_pages{use="kv_held"}': 15,
        'manylora:num_pages{use="kv_cached"}': 20,
        'manylora:num_pages{use="adapter_held"}': 5,
        'manylora:num_pages{use="adapter_cached"}': 10,
    }
    assert page["manylora:kv_cache_usage_ratio{}"] == 15 / 95
    assert (page['manylora:num_host_pages{use="free"}'], page['manylora:num_host_pages{use="adapter"}']) == (
        4,
        5,
    )


def test_a_quota_on_kv_is_what_its_use_is_measured_by(tokenizer_dir: Path) -> None:
    info = msgspec.structs.replace(server_info(tokenizer_dir), max_total_tokens=16 * 30)
    state = state_with(pages_kv=35, pages_kv_cached=20, pages_adapters=15)
    page = values(scheduler_families(state, lora_config(), info))
    assert page["manylora:kv_cache_usage_ratio{}"] == 0.5


# ---- the gateways' protocol -----------------------------------------------------------------------------------------


def lora_info(state: State, config: ServerConfig, tokenizer_dir: Path) -> dict[str, str]:
    [family] = [
        f
        for f in gateway_families(state, config, server_info(tokenizer_dir))
        if f.name == "vllm:lora_requests_info"
    ]
    [sample] = family.samples
    assert family.type == "gauge"
    assert 1.7e9 < sample.value < 1e11  # seconds since 1970: of several series a picker takes the latest
    return sample.labels


def test_the_gateway_learns_which_adapters_are_ready(tokenizer_dir: Path) -> None:
    state = state_with(
        adapter("old", "resident", last_use=1.0),
        adapter("on disk", "disk", waiting=2),
        adapter("on host", "host"),
        adapter("new", "resident", waiting=1, last_use=2.0),
        adapter("two,names", "resident"),
    )
    assert lora_info(state, lora_config(enable_lora=True, max_loras_per_batch=4), tokenizer_dir) == {
        "max_lora": "4",
        "running_lora_adapters": "new,old",
        "waiting_lora_adapters": "new,on disk",
    }


def test_the_gateways_list_is_bounded(tokenizer_dir: Path) -> None:
    state = state_with(*(adapter(f"a{i}", "resident", last_use=float(i)) for i in range(3000)))
    names = lora_info(state, lora_config(enable_lora=True), tokenizer_dir)["running_lora_adapters"].split(",")
    assert names == [f"a{i}" for i in range(2999, 2999 - MAX_LISTED_ADAPTERS, -1)]


def test_the_gateways_other_metrics(tokenizer_dir: Path) -> None:
    state = state_with(pages_kv=35, pages_kv_cached=20, pages_adapters=15)
    assert values(gateway_families(state, lora_config(), server_info(tokenizer_dir))) == {
        "vllm:num_requests_waiting{}": 2,
        "vllm:num_requests_running{}": 3,
        "vllm:kv_cache_usage_perc{}": 15 / 95,
        'vllm:cache_config_info{block_size="16",num_gpu_blocks="100"}': 1,
    }


# ---- the document -------------------------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, set[str], str]]:
    """Name -> type, labels and meaning, from the tables of docs/metrics.md."""
    rows = re.findall(r"^\| `(\w+:\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", DOCUMENT.read_text(), re.MULTILINE)
    assert rows
    return {
        name: (kind, set(re.findall(r"`(\w+)`", labels)), meaning) for name, kind, labels, meaning in rows
    }


@in_loop
async def test_the_document_lists_what_is_exported(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        front.state.config = msgspec.structs.replace(
            front.state.config, lora=LoRAArgs(enable_lora=True, max_loras_per_batch=4)
        )
        await front.post("/load_lora_adapter", {"lora_name": "a", "lora_path": "p"})
        await front.post("/generate", {"text": "Paris.", "lora_path": "unknown"})
        front.scheduler.failing_token = (1, NonFiniteLogitsError("no number"))
        await front.post("/generate", {"text": "Paris."})
        status, text = await front.get("/metrics")
        assert status == 200
        exported = {
            family.name + "_total" * (family.type == "counter"): (
                family.type,
                {label for sample in family.samples for label in sample.labels if label != "le"},
                family.documentation,
            )
            for family in parse_text(text)
        }
        assert documented() == exported
