"""What a server was asked to be: small frozen Structs, composed, handed on by part.

`runtime/flags.py` makes one from a command line, `Engine(...)` from keyword arguments. Processes receive it as JSON.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
LoRASharding = Literal["slora", "replicated"]
LoadFormat = Literal["auto", "dummy"]


class LoRAPath(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `--lora-paths`."""

    lora_name: str
    lora_path: str
    pinned: bool = False


class ModelArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Which model. `model_path` is a directory or a hub id as given; `model_dir` the directory it was resolved to."""

    model_path: str
    model_dir: str = ""
    tokenizer_path: str = ""  # "": as model_path
    served_model_name: str = ""  # "": model_path
    load_format: LoadFormat = "auto"
    dtype: Dtype = "auto"
    device: Device = "auto"
    context_length: int | None = None  # None: the model's own
    random_seed: int = 0
    chat_template: str = ""  # a file; "": the tokenizer's own


class LoRAArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Adapter serving. `max_lora_rank` and `target_modules` are admission limits only; None admits anything."""

    enable_lora: bool = False
    lora_paths: tuple[LoRAPath, ...] = ()
    max_loras_per_batch: int = 8  # distinct adapters in one step; the base model is free
    max_loaded_loras: int | None = None  # adapters with a host copy; None: only bytes bound them
    lora_backend: str = "triton"
    max_lora_rank: int | None = None
    target_modules: tuple[str, ...] | None = None
    sharding: LoRASharding = "slora"


class CacheArgs(msgspec.Struct, frozen=True, kw_only=True):
    """The one memory (docs/architecture.md)."""

    page_size: int = 16  # tokens
    mem_fraction_static: float = 0.88  # of the GPU, weights included
    max_total_tokens: int | None = None  # quota on KV tokens inside the pool
    disable_radix_cache: bool = False
    host_fraction: float = (
        0.25  # of the machine's free RAM at start, for adapters' host copies, all ranks together
    )


class ScheduleArgs(msgspec.Struct, frozen=True, kw_only=True):
    max_running_requests: int = 256  # request slots on the worker
    max_queued_requests: int = 4096  # sequences; beyond this a call gets 503
    chunked_prefill_size: int = 8192  # tokens a step may hold; -1 on the command line: the context's length
    disable_overlap_schedule: bool = False
    cuda_graph_max_bs: int = 256


class ParallelArgs(msgspec.Struct, frozen=True, kw_only=True):
    tp_size: int = 1


class HttpArgs(msgspec.Struct, frozen=True, kw_only=True):
    host: str = "127.0.0.1"
    port: int = 30000


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelArgs
    lora: LoRAArgs = LoRAArgs()
    cache: CacheArgs = CacheArgs()
    schedule: ScheduleArgs = ScheduleArgs()
    parallel: ParallelArgs = ParallelArgs()
    http: HttpArgs = HttpArgs()
    log_level: str = "info"
    run_dir: str = ""  # 0700, sockets; made by the supervisor
    shm_dir: str = ""  # 0700 below /dev/shm, adapter images; made by the supervisor
    supervisor_pid: int = 0  # children end with it; 0: whoever started them
    epoch: int = 0  # how often the process that reads this was started before
