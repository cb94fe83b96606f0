"""The client of scripts/demo, with nothing but the standard library: one mixed batch, then adapters that come and go."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import textwrap
import time
import urllib.error
import urllib.request
from typing import Any

START_TIMEOUT_S = 300
ADAPTERS = [None, "one_per_line", "json", "upper_case"]
PROMPTS = [
    "List 3 countries and their capitals.",
    "AI is a field of computer science focused on",
    "What is the capital of Germany?",
]
GREEDY = {"temperature": 0, "max_new_tokens": 64}


class Client:
    """JSON over HTTP. Methods raise RuntimeError when the server answers what the demo does not expect."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"

    def request(self, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, decoded body): a GET without a body, else a POST."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            self._url + path, data, {"Content-Type": "application/json"} if data else {}
        )
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                return response.status, json.loads(response.read() or "null")
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read() or "null")

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if self.request("/health")[0] == 200:
                    return
            except OSError:
                pass  # the port is not bound yet
            time.sleep(0.2)
        raise RuntimeError(f"the server was not ready after {START_TIMEOUT_S} s")

    def call(self, path: str, body: Any = None) -> Any:
        status, answer = self.request(path, body)
        if status != 200:
            raise RuntimeError(f"{path} answered {status}: {answer}")
        return answer

    def refused(self, path: str, body: Any) -> str:
        """The message of a request that must be answered with 400."""
        status, answer = self.request(path, body)
        if status != 400:
            raise RuntimeError(f"{path} answered {status}, expected 400: {answer}")
        return answer["error"]["message"]

    def generate(self, prompt: str, adapters: list[str | None]) -> list[dict[str, Any]]:
        """One batch: the same prompt to every adapter, None for the base model."""
        body = {"text": [prompt] * len(adapters), "lora_path": adapters, "sampling_params": GREEDY}
        return self.call("/generate", body)


def side_by_side(titles: list[str], texts: list[str]) -> None:
    """Print texts as columns that share the terminal's width."""
    width = max(16, (min(shutil.get_terminal_size((120, 24)).columns, 160) - 2) // len(texts) - 2)
    columns = [
        [title, "-" * width]
        + [part for line in text.strip().split("\n") for part in textwrap.wrap(line, width)]
        for title, text in zip(titles, texts, strict=True)
    ]
    for row in range(max(len(column) for column in columns)):
        cells = [column[row] if row < len(column) else "" for column in columns]
        print("  " + "  ".join(cell.ljust(width) for cell in cells).rstrip())


def heading(text: str) -> None:
    print(f"\n{text}")


def mixed_batches(client: Client) -> None:
    for prompt in PROMPTS:
        heading(f"One batch, one prompt, the base model and three adapters: {prompt!r}")
        answers = client.generate(prompt, ADAPTERS)
        side_by_side([name or "(base model)" for name in ADAPTERS], [one["text"] for one in answers])
        if len({one["text"] for one in answers}) != len(answers):
            raise RuntimeError("two of them gave the same answer")


def live_adapters(client: Client) -> None:
    prompt = PROMPTS[0]
    heading("Load a fourth adapter, in another language, while the server runs")
    reply = client.call("/load_lora_adapter", {"lora_name": "german", "lora_path": "demo/adapters/german"})
    print(f"  loaded: {', '.join(reply['loaded_adapters'])}")
    [german] = client.generate(prompt, ["german"])
    print(f"  german: {german['text'].strip()}")

    heading("Replace `json` by other weights under the same name: requests that run keep the old ones")
    [before] = client.generate(prompt, ["json"])
    client.call(
        "/load_lora_adapter", {"lora_name": "json", "lora_path": "demo/adapters/bullets", "replace": True}
    )
    [after] = client.generate(prompt, ["json"])
    versions = [one["meta_info"]["lora_version"] for one in (before, after)]
    side_by_side(
        [f"json, version {version}" for version in versions], [one["text"] for one in (before, after)]
    )
    if versions[0] == versions[1] or before["text"] == after["text"]:
        raise RuntimeError("the old version still answers")

    heading("Unload `german`: its name is gone at once, its memory is free")
    reply = client.call("/unload_lora_adapter", {"lora_name": "german"})
    print(f"  loaded: {', '.join(reply['loaded_adapters'])}")
    message = client.refused("/generate", {"text": prompt, "lora_path": "german"})
    print("  a request for it now gets 400:", *message.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    client = Client(parser.parse_args().port)
    client.wait_ready()
    started = time.monotonic()
    mixed_batches(client)
    live_adapters(client)
    print(f"\nAll of it took {time.monotonic() - started:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
