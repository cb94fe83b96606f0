"""The dashboard of a server with keys: it asks for one, keeps it no longer than the tab, and says what a key does not open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect

from tests.browser import CHROMIUM, opened, running_browser
from tests.server import Server, running_server

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

DEMO = Path(__file__).resolve().parents[2] / "demo"
USER_KEY, ADMIN_KEY, STRANGE_KEY = (
    "the-users-key-0123456789",
    "the-admins-key-0123456789",
    "nobodys-0123456789",
)
UNSENDABLE_KEY = "schlüssel-0123456789"  # a header has no such letter
REFUSED = ("Failed to load resource",)  # a browser logs every 4xx


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    place = tmp_path_factory.mktemp("keys")
    for name, key in (("api", USER_KEY), ("admin", ADMIN_KEY)):
        (place / f"{name}.keys").write_text(f"{key}\n")
        (place / f"{name}.keys").chmod(0o600)
    with running_server(
        DEMO / "model",
        f"--api-key-file={place / 'api.keys'}",
        f"--admin-key-file={place / 'admin.keys'}",
        f"--lora-paths=german={DEMO / 'adapters/german'}",
        log_dir=place,
        key=ADMIN_KEY,
    ) as server:
        yield server


@pytest.fixture
def page(browser: Browser, server: Server) -> Iterator[Page]:
    with opened(browser, server.url, allowed=REFUSED) as page:
        yield page


def give(page: Page, key: str) -> None:
    expect(page.locator("#key-dialog")).to_be_visible()
    page.fill("#key-input", key)
    page.keyboard.press("Enter")


def test_it_asks_once_and_again_for_a_better_one(page: Page) -> None:
    expect(page.locator("#key-message")).to_have_text("This needs a key.")
    give(page, UNSENDABLE_KEY)
    assert page.locator("#key-input").evaluate("input => input.validity.patternMismatch")
    give(page, STRANGE_KEY)
    expect(page.locator("#key-message")).to_have_text("The key is not known.")
    expect(page.locator("#adapters tbody tr")).to_have_count(0)
    give(page, ADMIN_KEY)
    expect(page.locator("#key-dialog")).not_to_be_visible()
    expect(page.locator("#adapters tbody")).to_contain_text("german")
    expect(page.locator("#status")).to_have_text("serving")
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 1, ""]
    page.reload()
    expect(page.locator("#adapters tbody")).to_contain_text("german")
    page.get_by_role("button", name="Key…").click()
    page.get_by_role("button", name="Forget").click()
    expect(page.locator("#adapters-message")).to_have_text("This needs a key.")
    assert page.evaluate("sessionStorage.length") == 0


def test_it_does_not_insist(page: Page, server: Server) -> None:
    expect(page.locator("#key-dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.locator("#status")).to_have_text("This needs a key.")
    expect(page.locator("#adapters-message")).to_have_text("This needs a key.")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.wait_for_timeout(2500)  # longer than its pause: it has stopped asking
    assert asked == []
    expect(page.locator("#key-dialog")).not_to_be_visible()
    page.get_by_role("button", name="Key…").click()
    give(page, ADMIN_KEY)
    expect(page.locator("#adapters tbody")).to_contain_text("german")
    row = page.locator("#adapters tbody tr")
    row.get_by_role("button", name="Pin german").click()
    expect(row).to_contain_text("pinned")
    assert server.get("/v1/adapters/german").body["pinned"]


def test_a_users_key_opens_all_but_the_adapters(page: Page) -> None:
    give(page, USER_KEY)
    expect(page.locator("#adapters-message")).to_have_text("This needs an admin key; yours is an API key.")
    expect(page.get_by_role("button", name="Load…", exact=True)).to_be_disabled()
    expect(page.locator("#status")).to_have_text("serving")
    expect(page.locator("#pool-total")).to_contain_text("GiB")
    page.get_by_label("german").check()
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator('article[data-state="ended"]')).to_have_count(2)
