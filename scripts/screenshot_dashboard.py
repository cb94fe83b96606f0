"""Draws docs/dashboard.png: the dashboard of a server on the demo model that has something to do for a minute.

From the repository's root, with Chromium installed: .venv/bin/python -m scripts.screenshot_dashboard [FILE]
"""

from __future__ import annotations

import argparse
import random
import tempfile
import threading
import time
from pathlib import Path

from playwright.sync_api import Page, expect

from tests.browser import CHROMIUM, opened, running_browser
from tests.server import REPOSITORY, Server, running_server

ADAPTERS = ("json", "german", "upper_case", "bullets", "one_per_line")
PROMPT = "List 3 countries and their capitals."
CLIENTS = 2
TRAFFIC_S = 75.0


def keep_asking(server: Server, client: int, until: float) -> None:
    """Texts of every length through every adapter, with pauses, so that the lines of the charts move."""
    draw = random.Random(client)
    while time.monotonic() < until:
        params = {
            "temperature": 1000,
            "max_new_tokens": draw.randrange(20, 200),
            "seed": draw.randrange(2**30),
        }
        text = "".join(draw.choices("abcdefghij ", k=draw.randrange(100, 400)))
        server.generate(text=text, lora_path=draw.choice((None, *ADAPTERS[:4])), sampling_params=params)
        time.sleep(draw.random() * 3)


def play(page: Page) -> None:
    """The base model and two adapters, each to its end."""
    page.fill("#play-prompt", PROMPT)
    page.get_by_role("button", name="Run", exact=True).click()
    expect(page.locator('article[data-state="ended"]')).to_have_count(3, timeout=60_000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, nargs="?", default=REPOSITORY / "docs/dashboard.png")
    args = parser.parse_args()
    if CHROMIUM is None:
        raise SystemExit("no Chromium is installed")
    adapters = [f"{name}=demo/adapters/{name}" for name in ADAPTERS]
    with (
        tempfile.TemporaryDirectory() as logs,
        running_server(
            "demo/model", "--page-size=128", "--lora-paths", *adapters, log_dir=Path(logs)
        ) as server,
        running_browser() as browser,
        opened(browser, server.url) as page,
    ):
        assert server.request("PATCH", "/v1/adapters/json", {"pinned": True}).status == 200
        until = time.monotonic() + TRAFFIC_S
        clients = [
            threading.Thread(target=keep_asking, args=(server, client, until)) for client in range(CLIENTS)
        ]
        for client in clients:
            client.start()
        page.wait_for_timeout(0.8 * TRAFFIC_S * 1000)
        play(page)
        page.screenshot(path=args.file, full_page=True)
        for client in clients:
            client.join()
    print(f"{args.file}: {args.file.stat().st_size // 1024} KiB")


if __name__ == "__main__":
    main()
