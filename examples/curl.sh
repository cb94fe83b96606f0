#!/usr/bin/env bash
# The native API and OpenAI's with nothing but curl.
#     examples/curl.sh [http://127.0.0.1:30000]
set -euo pipefail
url=${1:-http://127.0.0.1:30000}

# If the server has keys, add:  -H "Authorization: Bearer KEY"
ask() { curl --silent --show-error --fail-with-body "$@"; echo; }

ask "$url/generate" -d '{"text": "The capital of Egypt is", "lora_path": "upper_case",
  "sampling_params": {"temperature": 0, "max_new_tokens": 8}}'
ask "$url/v1/completions" -d '{"model": "json", "prompt": "List 3 countries and their capitals.",
  "temperature": 0, "max_tokens": 32}'
ask "$url/load_lora_adapter" -d '{"lora_name": "curl-german", "lora_path": "demo/adapters/german"}'
ask --no-buffer "$url/generate" -d '{"text": "Count from 1 to 12.", "lora_path": "curl-german", "stream": true,
  "sampling_params": {"temperature": 0}}'
ask "$url/unload_lora_adapter" -d '{"lora_name": "curl-german"}'
