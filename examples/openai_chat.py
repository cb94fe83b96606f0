"""OpenAI's client: an adapter is a model. First an answer at once, then one as it comes.

python examples/openai_chat.py [http://127.0.0.1:30000]
"""

from __future__ import annotations

import sys

from openai import OpenAI

URL = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:30000"

client = OpenAI(base_url=f"{URL}/v1", api_key="none")  # the server's API key, if it has any
print("models:", ", ".join(model.id for model in client.models.list()))

answer = client.chat.completions.create(
    model="json",
    messages=[{"role": "user", "content": "What is the capital of Germany?"}],
    temperature=0,
)
print("json:", answer.choices[0].message.content)

stream = client.chat.completions.create(
    model="upper_case",
    messages=[{"role": "user", "content": "What is the capital of Germany?"}],
    temperature=0,
    stream=True,
    stream_options={"include_usage": True},
)
print("upper_case: ", end="")
for chunk in stream:
    for choice in chunk.choices:
        print(choice.delta.content or "", end="", flush=True)
    if chunk.usage is not None:
        print(f" ({chunk.usage.completion_tokens} tokens)")
