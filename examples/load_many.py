"""Load many adapters at once: the server reads several side by side, and serves meanwhile.

python examples/load_many.py [http://127.0.0.1:30000]
"""

from __future__ import annotations

import json
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
KINDS = ("json", "upper_case", "german", "bullets", "one_per_line")
NAMES = [f"customer-{number}" for number in range(20)]


def call(method: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
    url = f"{URL}/v1/adapters/{name}"
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), method=method)
    ) as response:
        return json.load(response)


def load(number: int) -> dict[str, Any]:
    return call("PUT", NAMES[number], {"path": f"demo/adapters/{KINDS[number % len(KINDS)]}"})


with ThreadPoolExecutor(8) as threads:
    cards = list(threads.map(load, range(len(NAMES))))
    kib = sum(card["bytes"] for card in cards) // 1024
    print(f"loaded {len(cards)} adapters, {kib} KiB, ranks {sorted({card['rank'] for card in cards})}")
    list(threads.map(lambda name: call("DELETE", name, {}), NAMES))
print("unloaded them")
