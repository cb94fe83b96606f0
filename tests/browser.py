"""Debian's Chromium, driven by playwright; tests that need it are skipped where it is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, expect, sync_playwright

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTH, HEIGHT = 1280, 900
TIMEOUT_MS = 30_000
expect.set_options(timeout=TIMEOUT_MS)


@contextmanager
def running_browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()


class Watched:
    """A page and what it must not do: log errors, or ask another server. `allowed`: words of errors that may be logged."""

    def __init__(self, page: Page, url: str, allowed: tuple[str, ...] = ()) -> None:
        self.page, self.faults = page, list[str]()
        self._allowed, self._host = allowed, urlsplit(url).netloc
        page.set_default_timeout(TIMEOUT_MS)
        page.on("console", self._note_message)
        page.on("pageerror", lambda error: self.faults.append(f"uncaught: {error}"))
        page.on("request", lambda request: self._note_request(request.url))

    def _note_message(self, message: ConsoleMessage) -> None:
        if message.type in ("error", "warning") and not any(word in message.text for word in self._allowed):
            self.faults.append(f"{message.type}: {message.text}")

    def _note_request(self, url: str) -> None:
        if urlsplit(url).netloc != self._host:
            self.faults.append(f"asked {url}")


@contextmanager
def opened(
    browser: Browser,
    url: str,
    *,
    allowed: tuple[str, ...] = (),
    width: int = WIDTH,
    dark: bool = False,
) -> Iterator[Page]:
    """The page at `url` in a context of its own; at the end it must have done nothing that `Watched` forbids."""
    scheme = "dark" if dark else "light"
    context = browser.new_context(viewport={"width": width, "height": HEIGHT}, color_scheme=scheme)
    try:
        page = context.new_page()
        watched = Watched(page, url, allowed)
        page.goto(url)
        yield page
        assert watched.faults == []
    finally:
        context.close()
