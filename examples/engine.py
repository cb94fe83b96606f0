"""The server's processes without HTTP, inside a Python program. Needs no running server.

python examples/engine.py
"""

from __future__ import annotations

from manylora import Engine
from manylora.runtime.errors import AdapterNotFoundError

with Engine(
    model_path="demo/model", device="cpu", max_total_tokens=4096, lora_paths={"json": "demo/adapters/json"}
) as engine:
    engine.load_lora_adapter("german", "demo/adapters/german")
    answers = engine.generate(
        ["The capital of Egypt is"] * 3, {"temperature": 0}, lora_path=[None, "json", "german"]
    )
    for answer in answers:
        print(f"{answer['meta_info']['lora_name'] or 'base model'}:{answer['text']}")
    try:
        engine.generate("Hello", lora_path="french")
    except AdapterNotFoundError as error:
        print(error.code)
