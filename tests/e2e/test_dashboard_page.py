"""The dashboard in a real browser, on a real server of the demo model."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Locator, Page, expect

from tests.browser import CHROMIUM, opened, running_browser
from tests.server import Server, running_server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

DEMO = Path(__file__).resolve().parents[2] / "demo"
HOSTILE = "<img src=x onerror=\"document.title='hit'\">"
HOSTILE_FOLDER = "<script>document.title='hit'<\u2215script>"  # a folder's name has no slash
PROMPT = "List 3 countries and their capitals."
USES = ("kv_held", "kv_cached", "adapter_held", "adapter_cached", "free")
REFUSED = ("Failed to load resource",)  # a browser logs every 4xx


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    adapters = [f"{name}={DEMO}/adapters/{name}" for name in ("json", "german")]
    with running_server(
        DEMO / "model", "--lora-paths", *adapters, log_dir=tmp_path_factory.mktemp("log")
    ) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with opened(browser, server.url) as page:
        expect(row(page, "german")).to_be_visible()
        yield page


def row(page: Page, name: str) -> Locator:
    return page.locator("#adapters tbody tr").filter(has=page.get_by_text(name, exact=True))


def cell(page: Page, name: str, column: str) -> Locator:
    return row(page, name).locator(f'td[data-label="{column}"]')


def card(server: Server, name: str) -> Any:
    cards = server.get("/v1/adapters").body["data"]
    return next((one for one in cards if one["name"] == name), None)


def tick(page: Page, *names: str) -> None:
    """These and no others."""
    boxes = page.locator("#play-adapters label")
    for i in range(boxes.count()):
        boxes.nth(i).locator("input").set_checked(boxes.nth(i).inner_text().strip() in names)


def column(page: Page, name: str) -> Locator:
    return page.locator("#play-columns article").filter(has=page.get_by_text(name, exact=True))


def run_endlessly(page: Page) -> None:
    """Noise of a seed that draws no token which ends it."""
    page.fill("#play-prompt", PROMPT)
    page.fill("#play-seed", "2")
    page.fill("#play-temperature", "1000")
    page.fill("#play-tokens", "1900")
    page.get_by_role("button", name="Run", exact=True).click()


def fill_load_form(page: Page, name: str, path: object) -> None:
    page.get_by_role("button", name="Load…", exact=True).click()
    page.fill("#load-name", name)
    page.fill("#load-path", str(path))
    page.locator("#load-dialog").get_by_role("button", name="Load", exact=True).click()


def test_it_shows_the_adapters(page: Page, server: Server) -> None:
    expect(page).to_have_title("manylora")
    expect(page.locator("#status")).to_have_text("serving")
    expect(page.locator("#model")).to_have_text(str(DEMO / "model"))
    expect(page.locator("#adapters tbody tr")).to_have_count(2)
    for name in ("json", "german"):
        known = card(server, name)
        expect(row(page, name)).to_contain_text(known["path"])
        for label, value in (("Version", known["version"]), ("Rank", known["rank"]), ("Tier", known["tier"])):
            expect(cell(page, name, label)).to_have_text(str(value))
    expect(cell(page, "json", "Size")).to_have_text("704 KiB")
    page.get_by_label("Find").fill("GERM")
    expect(page.locator("#adapters tbody tr")).to_have_count(1)
    page.get_by_label("Find").fill("")
    expect(page.locator("#adapters tbody tr")).to_have_count(2)


def test_adapters_are_loaded_pinned_replaced_and_unloaded_by_clicking(page: Page, server: Server) -> None:
    fill_load_form(page, "team/bullets", DEMO / "adapters/bullets")
    expect(page.get_by_text("team/bullets is loaded")).to_be_visible()
    first = card(server, "team/bullets")
    expect(cell(page, "team/bullets", "Version")).to_have_text(str(first["version"]))

    row(page, "team/bullets").get_by_role("button", name="Pin team/bullets", exact=True).click()
    expect(cell(page, "team/bullets", "Pinned")).to_have_text("pinned")
    assert card(server, "team/bullets")["pinned"]
    row(page, "team/bullets").get_by_role("button", name="Unpin team/bullets").click()
    expect(cell(page, "team/bullets", "Pinned")).to_have_text("")
    assert not card(server, "team/bullets")["pinned"]

    row(page, "team/bullets").get_by_role("button", name="Replace…").click()
    expect(page.locator("#load-version")).to_have_value(str(first["version"]))
    page.fill("#load-path", str(DEMO / "adapters/upper_case"))
    page.locator("#load-dialog").get_by_role("button", name="Load", exact=True).click()
    expect(row(page, "team/bullets")).to_contain_text("adapters/upper_case")
    assert card(server, "team/bullets")["version"] > first["version"]

    row(page, "team/bullets").get_by_role("button", name="Unload…").click()
    page.locator("#unload-dialog").get_by_role("button", name="Cancel").click()
    assert card(server, "team/bullets") is not None
    row(page, "team/bullets").get_by_role("button", name="Unload…").click()
    page.locator("#unload-dialog").get_by_role("button", name="Unload", exact=True).click()
    expect(row(page, "team/bullets")).to_have_count(0)
    assert card(server, "team/bullets") is None


def test_a_refused_load_is_said_and_can_be_tried_again(browser: Browser, server: Server) -> None:
    with opened(browser, server.url, allowed=REFUSED) as page:
        expect(row(page, "json")).to_be_visible()
        version = card(server, "json")["version"]
        fill_load_form(page, "json", DEMO / "adapters/bullets")
        expect(page.locator(".notice.bad")).to_contain_text("Loading json:")
        assert card(server, "json")["version"] == version
        page.get_by_role("button", name="Change and try again").click()
        expect(page.locator(".notice.bad")).to_have_count(0)
        expect(page.locator("#load-path")).to_have_value(str(DEMO / "adapters/bullets"))
        page.fill("#load-name", "again")
        page.fill("#load-path", "/no/such/place")
        page.locator("#load-dialog").get_by_role("button", name="Load", exact=True).click()
        expect(page.locator(".notice.bad")).to_contain_text("Loading again:")
        assert card(server, "again") is None


@pytest.mark.parametrize("kind", ["text", "chat"])
def test_the_playground_answers_side_by_side(page: Page, server: Server, kind: str) -> None:
    page.select_option("#play-kind", kind)
    page.fill("#play-prompt", PROMPT)
    names = {"base model": None, "json": "json", "german": "german"}
    tick(page, *names)
    page.get_by_role("button", name="Run", exact=True).click()
    texts: dict[str, str] = {}
    for title, name in names.items():
        expect(column(page, title)).to_have_attribute("data-state", "ended")
        expect(column(page, title)).to_contain_text("ended: stop")
        expect(column(page, title)).to_contain_text(re.compile(r"\d tokens .*first after \d"))
        texts[title] = column(page, title).locator(".output").text_content() or ""
        assert texts[title] == answer(server, kind, name)
    assert len(set(texts.values())) == 3
    expect(page.get_by_role("button", name="Stop all")).to_be_disabled()


def answer(server: Server, kind: str, adapter: str | None) -> str:
    """What the server says without a browser."""
    if kind == "text":
        params = {"temperature": 0, "max_new_tokens": 128}
        return server.generate(text=PROMPT, lora_path=adapter, sampling_params=params)["text"]
    messages = [{"role": "user", "content": PROMPT}]
    body = {"model": str(DEMO / "model"), "lora_path": adapter, "messages": messages, "temperature": 0}
    reply = server.post("/v1/chat/completions", body)
    assert reply.status == 200, reply
    return reply.body["choices"][0]["message"]["content"]


def test_a_column_can_be_stopped(page: Page, server: Server) -> None:
    tick(page, "json", "german")
    run_endlessly(page)
    for name in ("json", "german"):
        expect(column(page, name).locator(".output")).not_to_be_empty()
        expect(column(page, name)).to_contain_text(re.compile(r"\d tokens/s"))
    column(page, "json").get_by_role("button", name="Stop").click()
    expect(column(page, "json")).to_have_attribute("data-state", "stopped")
    expect(column(page, "german")).to_have_attribute("data-state", "running")
    page.get_by_role("button", name="Stop all").click()
    expect(column(page, "german")).to_have_attribute("data-state", "stopped")
    server.wait_idle()  # the requests have ended too


def test_an_error_is_said_in_its_column(page: Page, server: Server) -> None:
    assert server.request("PUT", "/v1/adapters/gone", {"path": str(DEMO / "adapters/bullets")}).status == 201
    expect(row(page, "gone")).to_be_visible()
    tick(page, "gone", "json")
    run_endlessly(page)
    for name in ("gone", "json"):
        expect(column(page, name).locator(".output")).not_to_be_empty()
    row(page, "gone").get_by_role("button", name="Unload…").click()
    page.get_by_label("go on until they end").check()
    page.locator("#unload-dialog").get_by_role("button", name="Unload", exact=True).click()
    expect(row(page, "gone")).to_have_count(0)
    page.get_by_role("button", name="End its requests now").click()
    expect(column(page, "gone")).to_have_attribute("data-state", "failed")
    expect(column(page, "gone").get_by_role("alert")).to_contain_text("gone")
    expect(page.get_by_text("gone is unloaded.")).to_be_visible()
    expect(column(page, "json")).to_have_attribute("data-state", "running")
    page.get_by_role("button", name="Stop all").click()
    server.wait_idle()


def test_more_columns_than_connections_take_turns(page: Page, server: Server) -> None:
    more = ["one", "two", "three"]
    for name in more:
        assert (
            server.request("PUT", f"/v1/adapters/{name}", {"path": str(DEMO / "adapters/json")}).status == 201
        )
    expect(row(page, "three")).to_be_visible()
    tick(page, "base model", "json", "german", *more)
    run_endlessly(page)
    states = page.locator("#play-columns article")
    expect(states).to_have_count(6)
    expect(page.locator('article[data-state="running"]')).to_have_count(4)
    expect(page.locator('article[data-state="waiting"]')).to_have_count(2)
    with page.expect_response(lambda response: response.url.endswith("/v1/adapters")) as polled:
        pass  # the page's own calls go on
    assert polled.value.status == 200
    column(page, "json").get_by_role("button", name="Stop").click()
    expect(page.locator('article[data-state="waiting"]')).to_have_count(1)
    page.get_by_role("button", name="Stop all").click()
    expect(page.locator('article[data-state="stopped"]')).to_have_count(6)
    server.wait_idle()
    for name in more:
        assert server.request("DELETE", f"/v1/adapters/{name}").status == 200


def test_the_pools_numbers_are_the_schedulers_and_add_up(page: Page, server: Server) -> None:
    tick(page, "json")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(column(page, "json")).to_have_attribute("data-state", "ended")
    ledger, info = server.wait_idle(), server.get("/get_server_info").body
    expect(page.locator('.segment[data-use="kv_held"]')).to_have_attribute("data-pages", "0")
    expect(page.locator('.segment[data-use="kv_cached"]')).to_have_attribute(
        "data-pages", str(ledger["pages_kv_cached"])
    )
    expect(page.locator('.segment[data-use="free"]')).to_have_attribute(
        "data-pages", str(ledger["pages_free"])
    )
    pages = {
        use: int(page.locator(f'.segment[data-use="{use}"]').get_attribute("data-pages") or "")
        for use in USES
    }
    assert sum(pages.values()) == ledger["pages_total"]
    assert pages["adapter_held"] + pages["adapter_cached"] == ledger["pages_adapters"] > 0
    total = ledger["pages_total"] * info["page_bytes"]
    expect(page.locator("#pool-total")).to_contain_text(f"{total / 2**30:.1f} GiB")
    widths = {
        use: page.locator(f'.segment[data-use="{use}"]').evaluate("n => n.getBoundingClientRect().width")
        for use in USES
    }
    assert widths["kv_held"] == 0 < widths["kv_cached"] < widths["free"]


def test_the_charts_show_what_is_generated(page: Page) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    figure = page.locator("figure")
    expect(figure).to_have_count(4)
    for title in ("Time to first token", "Time from token to token"):
        chart = figure.filter(has_text=title)
        expect(chart.locator("b").first).to_have_text(re.compile(r"^\d+(\.\d+)? m?s$"))
        expect(chart.locator("path.line-0")).to_have_attribute("d", re.compile(r"^M"))
    tokens = figure.filter(has_text="Tokens per second").get_by_role("img")
    expect(tokens).to_have_attribute("aria-label", re.compile(r"generated \d"))


def test_what_is_hostile_stays_text(page: Page, server: Server, tmp_path: Path) -> None:
    place = tmp_path / HOSTILE_FOLDER
    shutil.copytree(DEMO / "adapters/german", place)
    fill_load_form(page, HOSTILE, place)
    expect(page.get_by_text(f"{HOSTILE} is loaded")).to_be_visible()  # in a notice
    expect(row(page, HOSTILE)).to_contain_text(HOSTILE_FOLDER)
    tick(page, HOSTILE)
    page.fill("#play-prompt", f"{HOSTILE} {PROMPT}")
    page.get_by_role("button", name="Run", exact=True).click()
    expect(column(page, HOSTILE)).to_have_attribute("data-state", "ended")
    row(page, HOSTILE).get_by_role("button", name="Unload…").click()
    expect(page.locator("#unload-title")).to_have_text(f"Unload {HOSTILE}?")
    page.locator("#unload-dialog").get_by_role("button", name="Unload", exact=True).click()
    expect(row(page, HOSTILE)).to_have_count(0)
    assert card(server, HOSTILE) is None
    expect(page.locator("img, #adapters script")).to_have_count(0)
    expect(page).to_have_title("manylora")


def test_nothing_can_become_markup_or_come_from_elsewhere(browser: Browser, server: Server) -> None:
    """The browser itself refuses, whatever a later change of the page does."""
    refusals = ("Content Security Policy", "Refused", "TrustedHTML", "Failed to load", "blocked")
    with opened(browser, server.url, allowed=refusals) as page:
        expect(row(page, "json")).to_be_visible()
        assert page.evaluate(
            "() => { try { document.body.innerHTML = 'x'; } catch (e) { return e.name; } }"
        ) == ("TypeError")
        other = server.url.replace("127.0.0.1", "localhost")
        fetched = "url => fetch(url, {mode: 'no-cors'}).then(() => 'came', () => 'refused')"
        assert page.evaluate(fetched, other) == "refused"


@pytest.mark.parametrize(("width", "dark"), [(1280, True), (390, False)])
def test_it_fits_the_screen(browser: Browser, server: Server, width: int, dark: bool) -> None:
    with opened(browser, server.url, width=width, dark=dark) as page:
        expect(row(page, "json")).to_be_visible()
        expect(row(page, "json").get_by_role("button", name="Unload…")).to_be_in_viewport(ratio=1)
        assert page.evaluate("document.scrollingElement.scrollWidth") <= width
        back = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", back)[:3])) < 3 * 64) is dark


def test_percentiles_are_those_of_the_histogram(page: Page) -> None:
    """Of 10 observations 5 are at most 0.1, 4 more at most 0.2, and one is above all bounds."""

    def text(counts: list[int]) -> str:
        name = "manylora:inter_token_latency_seconds_bucket"
        bounds = ("0.1", "0.2", "+Inf")
        return "\n".join(f'{name}{{le="{b}"}} {c}.0' for b, c in zip(bounds, counts, strict=True))

    script = """async ([before, now]) => {
        const { parse, quantile } = await import("/dashboard/metrics.js");
        const [old, young] = [parse(before, 0), parse(now, 1000)];
        return [0.25, 0.5, 0.7, 0.99].map((q) => quantile("nextToken", q)(young, old))
            .concat([quantile("nextToken", 0.5)(young, young)]);
    }"""
    found = page.evaluate(script, [text([7, 7, 7]), text([12, 16, 17])])
    assert found == [pytest.approx(0.05), pytest.approx(0.1), pytest.approx(0.15), pytest.approx(0.2), None]


def test_labels_are_read_as_they_were_meant(page: Page) -> None:
    name = 'a"b\\c,d="e}\n'
    escaped = name.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    line = f'manylora:model_info{{device="cpu",model="{escaped}"}} 1.0'
    script = """async (text) => (await import("/dashboard/metrics.js")).parse(text, 0).model"""
    assert page.evaluate(script, line) == {"device": "cpu", "model": name}
