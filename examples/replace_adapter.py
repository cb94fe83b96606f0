"""Load an adapter, replace it only if nobody else has meanwhile, and unload it.

python examples/replace_adapter.py [http://127.0.0.1:30000]
"""

from __future__ import annotations

import json
import sys
import urllib.error
import urllib.request
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"


def call(method: str, name: str, body: dict[str, Any]) -> dict[str, Any]:
    """The adapter's card. Where there are keys, these routes want the admin's as `Authorization: Bearer KEY`."""
    url = f"{URL}/v1/adapters/{name}"
    with urllib.request.urlopen(
        urllib.request.Request(url, json.dumps(body).encode(), method=method)
    ) as response:
        return json.load(response)


first = call("PUT", "example", {"path": "demo/adapters/json", "if_version": 0})  # 0: it is not loaded
print(f"loaded version {first['version']}, rank {first['rank']}")
second = call("PUT", "example", {"path": "demo/adapters/bullets", "if_version": first["version"]})
print(f"replaced by a later version: {second['version'] > first['version']}, rank {second['rank']}")
try:
    call("PUT", "example", {"path": "demo/adapters/german", "if_version": first["version"]})
except urllib.error.HTTPError as refusal:
    print(refusal.code, json.load(refusal)["error"]["code"])
last = call("DELETE", "example", {"drain_s": 30})  # requests that still run get thirty seconds to end
print(f"unloaded; served {last['requests']} requests")
