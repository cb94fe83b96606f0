"""What the server has counted of one adapter, from /metrics.

python examples/adapter_metrics.py [http://127.0.0.1:30000 [json]]
"""

from __future__ import annotations

import sys
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
ADAPTER = sys.argv[2] if len(sys.argv) > 2 else "json"

with urllib.request.urlopen(f"{URL}/metrics") as response:
    page = response.read().decode()
for family in text_string_to_metric_families(page):
    for sample in family.samples:
        if sample.labels.get("adapter") == ADAPTER:
            tier = sample.labels.get("tier")
            if tier is None:
                print(f"{sample.name} {sample.value:g}")
            elif sample.value:
                print(f"{sample.name} {tier}")
