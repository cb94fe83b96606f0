"""An answer that keeps to a JSON schema, whatever the model would rather write.

python examples/structured_output.py [http://127.0.0.1:30000]
"""

from __future__ import annotations

import json
import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"
SCHEMA = {
    "type": "object",
    "properties": {"answer": {"enum": ["Berlin", "Cairo", "Paris"]}},
    "required": ["answer"],
    "additionalProperties": False,
}

client = OpenAI(base_url=f"{URL}/v1", api_key="none")
answer = client.chat.completions.create(
    model="json",
    messages=[{"role": "user", "content": "What is the capital of Germany?"}],
    response_format={"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}},
    temperature=0,
    max_tokens=256,
)
print(json.loads(answer.choices[0].message.content or ""))

# Beyond OpenAI's: a regular expression, or a grammar in `ebnf`.
choice = client.completions.create(
    model="json",
    prompt="The capital of Egypt is",
    temperature=0,
    extra_body={"regex": " (Berlin|Cairo|Paris)"},
)
print(choice.choices[0].text)
