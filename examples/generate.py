"""One call, one prompt for several adapters and for the base model, which is null: one batch computes them all.

python examples/generate.py [http://127.0.0.1:30000]
"""

from __future__ import annotations

import json
import sys
import urllib.request

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
ADAPTERS = [None, "json", "upper_case"]

body = {
    "text": ["List 3 countries and their capitals."] * len(ADAPTERS),
    "lora_path": ADAPTERS,
    "sampling_params": {"temperature": 0, "max_new_tokens": 64},
}
request = urllib.request.Request(f"{URL}/generate", json.dumps(body).encode())
with urllib.request.urlopen(request) as response:
    answers = json.load(response)
for answer in answers:
    meta = answer["meta_info"]
    print(f"{meta['lora_name'] or 'base model'} (version {meta['lora_version']}):{answer['text']}")
