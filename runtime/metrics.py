"""Everything that `/metrics` publishes, made from what the server counts anyway. docs/metrics.md lists it.

Names are `manylora:…`, but for the five that the Kubernetes inference gateways look for, which go by the names of the
server they know best: a gateway that was told nothing finds them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from math import inf, isinf

from prometheus_client import Metric
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
)

from manylora import __version__
from manylora.runtime.adapter_metrics import COUNTS, TIERS, AdapterLabels, AdapterRow
from manylora.runtime.config import ServerConfig
from manylora.runtime.messages import AdapterState, ServerInfo, State
from manylora.tokenizer_manager.request_metrics import Histogram, RequestMetrics

PREFIX = "manylora:"
GATEWAY_PREFIX = "vllm:"
MAX_LISTED_ADAPTERS = 1000  # in one label of lora_requests_info

Rows = Mapping[tuple[str, ...], float]


def request_families(metrics: RequestMetrics) -> list[Metric]:
    """What the front counts and times."""
    return [
        _counter("prompt_tokens", "Prompt tokens of requests that began to answer.", metrics.prompt_tokens),
        _counter("prompt_tokens_cached", "Those of them found in the prefix cache.", metrics.cached_tokens),
        _counter("generation_tokens", "Generated tokens.", metrics.generated_tokens),
        _counters(
            "requests_finished",
            "Requests that were accepted and have ended. A request is one sample of one prompt.",
            ["finish_reason"],
            _by_one(metrics.finished),
        ),
        _counters(
            "requests_rejected",
            "Requests that the scheduler refused.",
            ["code"],
            _by_one(metrics.rejected),
        ),
        _counters(
            "requests_failed",
            "Requests that ended in an error, by its code.",
            ["code"],
            _by_one(metrics.failed),
        ),
        _histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to its first token.",
            metrics.first_token_s,
        ),
        _histogram(
            "inter_token_latency_seconds", "From one token of a request to the next.", metrics.next_token_s
        ),
        _histogram(
            "e2e_request_latency_seconds",
            "From a request's arrival to its end, of those that ended by themselves.",
            metrics.whole_s,
        ),
        _histogram(
            "request_queue_time_seconds",
            "From a request's arrival at the scheduler to its first step.",
            metrics.queue_s,
        ),
        _histogram(
            "request_prompt_tokens",
            "Prompt tokens of a request that ended by itself.",
            metrics.prompt_length,
        ),
        _histogram(
            "request_generation_tokens",
            "Generated tokens of a request that ended by itself.",
            metrics.generated_length,
        ),
    ]


def http_families(responses: Mapping[tuple[str, str, str], int]) -> list[Metric]:
    """`responses`: how many, by handler, method and status class."""
    return [
        _counters(
            "http_responses",
            "HTTP responses, by route and class of status; cancelled: the client left first.",
            ["handler", "method", "status"],
            responses,
        )
    ]


def scheduler_families(state: State, config: ServerConfig, info: ServerInfo) -> list[Metric]:
    """What the scheduler holds now."""
    tiers = dict.fromkeys(TIERS, 0)
    for adapter in state.adapters:
        tiers[adapter.tier] += 1
    host_used = state.host_pages_total - state.host_pages_free
    return [
        _gauge("num_requests_running", "Requests in the running batch.", state.running),
        _gauge("num_requests_waiting", "Requests that wait.", state.waiting),
        _gauges("num_pages", "Pages of a GPU's pool, by what is in them.", ["use"], _by_one(_pages(state))),
        _gauge("page_bytes", "Bytes of a page, on each GPU.", info.page_bytes),
        _gauges(
            "num_host_pages",
            "Pages for adapters in the host's memory, by what is in them.",
            ["use"],
            _by_one({"free": state.host_pages_free, "adapter": host_used}),
        ),
        _gauge(
            "kv_cache_usage_ratio",
            "Part of the pages KV may have that is held by running requests; at 1 others must wait.",
            _kv_usage(state, config, info),
        ),
        _gauges("num_adapters", "Loaded adapters, by tier.", ["tier"], _by_one(tiers)),
        _counter("steps", "Steps that the workers have completed.", state.steps),
        _counter("preemptions", "Times a running request went back to wait for memory.", state.preemptions),
        _info("build", "This program.", {"version": __version__}),
        _info(
            "model",
            "What is served, and how.",
            {
                "model": config.model.served_model_name or config.model.model_path,
                "dtype": info.dtype,
                "device": info.device,
                "tp_size": str(config.parallel.tp_size),
                "lora_sharding": config.lora.sharding,
            },
        ),
    ]


def adapter_families(rows: Mapping[str, AdapterRow]) -> list[Metric]:
    """What is told of single adapters, by label value."""
    counts = {
        field: {(label,): row.counts[index] for label, row in rows.items()}
        for index, field in enumerate(COUNTS)
    }
    return [
        _gauges(
            "adapter_tier",
            "1 for the tier the adapter is in, 0 for the others.",
            ["adapter", "tier"],
            {(label, tier): count for label, row in rows.items() for tier, count in row.tiers.items()},
        ),
        _of_rows("adapter_pages", "Pages that the adapter has on each GPU.", rows, lambda row: row.pages),
        _of_rows(
            "adapter_requests_running", "Its requests in the running batch.", rows, lambda row: row.running
        ),
        _of_rows("adapter_requests_waiting", "Its requests that wait.", rows, lambda row: row.waiting),
        _of_rows(
            "adapter_last_use_timestamp_seconds",
            "When it was last used, in seconds since 1970; 0: never.",
            rows,
            lambda row: row.last_use,
        ),
        _counters(
            "adapter_requests",
            "Its requests that were accepted.",
            ["adapter"],
            counts["requests"],
        ),
        _counters("adapter_loads", "Times it was copied into GPU pages.", ["adapter"], counts["loads"]),
        _counters("adapter_evictions", "Times it lost its GPU pages.", ["adapter"], counts["evictions"]),
        _counters(
            "adapter_hits",
            "Its requests that found it on the GPU when they came.",
            ["adapter"],
            counts["hits"],
        ),
        _counters(
            "adapter_queue_seconds", "What its requests waited, together.", ["adapter"], counts["queue_s"]
        ),
        _counters("adapter_generation_tokens", "Its generated tokens.", ["adapter"], counts["tokens"]),
    ]


def gateway_families(state: State, config: ServerConfig, info: ServerInfo) -> list[Metric]:
    """The model server protocol of the Kubernetes inference gateways, under the names they look for by default."""
    families: list[Metric] = [
        _gauge("num_requests_waiting", "Requests that wait.", state.waiting, GATEWAY_PREFIX),
        _gauge("num_requests_running", "Requests in the running batch.", state.running, GATEWAY_PREFIX),
        _gauge(
            "kv_cache_usage_perc",
            "The same as manylora:kv_cache_usage_ratio.",
            _kv_usage(state, config, info),
            GATEWAY_PREFIX,
        ),
        _info(
            "cache_config",
            "Tokens in a page, and pages of a GPU's pool.",
            {"block_size": str(config.cache.page_size), "num_gpu_blocks": str(state.pages_total)},
            GATEWAY_PREFIX,
        ),
    ]
    if config.lora.enable_lora:
        requests_info = GaugeMetricFamily(
            f"{GATEWAY_PREFIX}lora_requests_info",
            "Adapters ready on the GPU and adapters that requests wait for; the value is the time.",
            labels=["max_lora", "running_lora_adapters", "waiting_lora_adapters"],
        )
        ready = _listed(one for one in state.adapters if one.tier == "resident")
        waiting = _listed(one for one in state.adapters if one.waiting)
        requests_info.add_metric([str(config.lora.max_loras_per_batch), ready, waiting], time.time())
        families.append(requests_info)
    return families


class AdapterFamilies:
    """The families of single adapters, scrape after scrape."""

    def __init__(self) -> None:
        self._labels = AdapterLabels()

    def collect(self, state: State) -> list[Metric]:
        return adapter_families(self._labels.update(state.adapters))


def _pages(state: State) -> dict[str, int]:
    adapters_cached = state.pages_cached - state.pages_kv_cached
    return {
        "free": state.pages_free,
        "kv_held": state.pages_kv - state.pages_kv_cached,
        "kv_cached": state.pages_kv_cached,
        "adapter_held": state.pages_adapters - adapters_cached,
        "adapter_cached": adapters_cached,
    }


def _kv_usage(state: State, config: ServerConfig, info: ServerInfo) -> float:
    """What KV holds of what it could have: cached pages are its for the asking, held adapters' pages are not."""
    pages = _pages(state)
    quota = info.max_total_tokens // config.cache.page_size
    room = min(quota, state.pages_total - pages["adapter_held"])
    return pages["kv_held"] / room if room > 0 else 1.0


def _listed(adapters: Iterable[AdapterState]) -> str:
    """Names, the last used first; one with a comma would be read as two."""
    names = [
        one.lora_name for one in sorted(adapters, key=lambda one: -one.last_use) if "," not in one.lora_name
    ]
    return ",".join(names[:MAX_LISTED_ADAPTERS])


def _by_one(values: Mapping[str, float]) -> Rows:
    return {(label,): value for label, value in values.items()}


def _counter(name: str, text: str, value: float) -> Metric:
    return CounterMetricFamily(PREFIX + name, text, value=value)


def _counters(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = CounterMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in rows.items():
        family.add_metric(values, value)
    return family


def _gauge(name: str, text: str, value: float, prefix: str = PREFIX) -> Metric:
    return GaugeMetricFamily(prefix + name, text, value=value)


def _gauges(name: str, text: str, labels: Sequence[str], rows: Rows) -> Metric:
    family = GaugeMetricFamily(PREFIX + name, text, labels=labels)
    for values, value in rows.items():
        family.add_metric(values, value)
    return family


def _of_rows(
    name: str, text: str, rows: Mapping[str, AdapterRow], value: Callable[[AdapterRow], float]
) -> Metric:
    return _gauges(name, text, ["adapter"], {(label,): value(row) for label, row in rows.items()})


def _info(name: str, text: str, values: dict[str, str], prefix: str = PREFIX) -> Metric:
    return InfoMetricFamily(prefix + name, text, value=values)


def _histogram(name: str, text: str, histogram: Histogram) -> Metric:
    buckets: list[tuple[str, float]] = []
    total = 0
    for bound, count in zip((*histogram.bounds, inf), histogram.counts, strict=True):
        total += count
        buckets.append(("+Inf" if isinf(bound) else str(float(bound)), total))
    return HistogramMetricFamily(PREFIX + name, text, buckets=buckets, sum_value=histogram.sum)
