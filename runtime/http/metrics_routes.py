"""`/metrics`, as Prometheus and OpenMetrics want it.

Whoever may ask for an answer may scrape: the labels name the adapters, so strangers may not.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from aiohttp import web
from prometheus_client import Metric
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from manylora.runtime.errors import NotReadyError
from manylora.runtime.http.common import STATE, HttpState
from manylora.runtime.http.observe import RESPONSES
from manylora.runtime.http.route import Access, Route
from manylora.runtime.metrics import (
    AdapterFamilies,
    gateway_families,
    http_families,
    request_families,
    scheduler_families,
)

SCRAPE_TIMEOUT_S = 5.0
REUSE_FACTOR = 10  # a page is given again for so many times what it cost
MAX_REUSE_S = 1.0
_OPENMETRICS = "application/openmetrics-text"
_openmetrics_page: Callable[..., bytes] = openmetrics.generate_latest  # type: ignore[untyped]


class MetricsPage:
    """Makes the pages. A gateway scrapes twenty times a second: scraping may cost a tenth of the front, never more."""

    def __init__(self, state: HttpState, responses: dict[tuple[str, str, str], int]) -> None:
        self._state = state
        self._responses = responses
        self._adapters = AdapterFamilies()
        self._lock = asyncio.Lock()
        self._pages: dict[str, tuple[float, bytes]] = {}  # by content type: until when it holds, and the page

    async def render(self, accept: str) -> tuple[bytes, str]:
        """The page and its content type. Raises NotReadyError if the scheduler does not answer in time."""
        content_type, encode = _choose_format(accept)
        async with self._lock:
            began = time.monotonic()
            until, page = self._pages.get(content_type, (0.0, b""))
            if began >= until:
                # The library's other ways of escaping make underscores of the colons in some lines.
                page = encode(_Families(await self._collect()), escaping=openmetrics.ALLOWUTF8)
                cost = time.monotonic() - began
                self._pages[content_type] = (began + cost + min(REUSE_FACTOR * cost, MAX_REUSE_S), page)
        return page, content_type

    async def _collect(self) -> list[Metric]:
        manager, config = self._state.manager, self._state.config
        try:
            async with asyncio.timeout(SCRAPE_TIMEOUT_S):
                state = await manager.state()
        except TimeoutError as error:
            raise NotReadyError(f"The scheduler did not answer within {SCRAPE_TIMEOUT_S:.0f} s.") from error
        return [
            *request_families(manager.metrics),
            *http_families(self._responses),
            *scheduler_families(state, config, manager.info),
            *self._adapters.collect(state),
            *gateway_families(state, config, manager.info),
        ]


def _choose_format(accept: str) -> tuple[str, Callable[..., bytes]]:
    """OpenMetrics for whoever names it, else the text that all understand."""
    if any(part.partition(";")[0].strip() == _OPENMETRICS for part in accept.split(",")):
        return openmetrics.CONTENT_TYPE_LATEST, _openmetrics_page
    return CONTENT_TYPE_PLAIN_0_0_4, generate_latest


class _Families(Collector):
    """What was collected, in the shape that encoders read."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return iter(self._families)


PAGE = web.AppKey("metrics", MetricsPage)


async def metrics(request: web.Request) -> web.Response:
    """Everything there is to measure, in the format that the client accepts."""
    accept = ",".join(request.headers.getall("Accept", []))
    page, content_type = await request.app[PAGE].render(accept)
    return web.Response(body=page, headers={"Content-Type": content_type})


def install(app: web.Application) -> None:
    """Give the application its page of metrics."""
    app[PAGE] = MetricsPage(app[STATE], app[RESPONSES])


ROUTES = (
    Route(
        "GET",
        "/metrics",
        metrics,
        Access.USER,
        "Everything that is measured, for Prometheus.",
        text="text/plain",
    ),
)
