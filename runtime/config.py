"""What a server was asked to be: small frozen Structs, composed, handed on by part.

`runtime/flags.py` makes one from a command line, `Engine(...)` from keyword arguments. Processes receive it as JSON.
"""

from __future__ import annotations

import ipaddress
from typing import Literal

import msgspec

Device = Literal["auto", "cuda", "cpu"]
Dtype = Literal["auto", "float32", "float16", "bfloat16"]
LoRASharding = Literal["slora", "replicated"]
LoadFormat = Literal["auto", "dummy"]
LogFormat = Literal["text", "json"]


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

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can connect. A name may mean anything, unless it is localhost."""
        try:
            address = ipaddress.ip_address(self.host)
        except ValueError:
            return self.host.lower() == "localhost"
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return (mapped or address).is_loopback


class AccessArgs(msgspec.Struct, frozen=True, kw_only=True):
    """Who may do what over HTTP. Of the keys only where they are written: processes and logs see this."""

    api_key_file: str | None = None
    admin_key_file: str | None = None
    insecure: bool = False  # listen on a public address without an API key
    adapter_root: tuple[str, ...] = ()  # directories below which adapters may be loaded
    allow_hub: bool = False  # adapters may be loaded from the hub

    @property
    def asks_for_keys(self) -> bool:
        return self.api_key_file is not None or self.admin_key_file is not None


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True):
    model: ModelArgs
    lora: LoRAArgs = LoRAArgs()
    cache: CacheArgs = CacheArgs()
    schedule: ScheduleArgs = ScheduleArgs()
    parallel: ParallelArgs = ParallelArgs()
    http: HttpArgs = HttpArgs()
    access: AccessArgs = AccessArgs()
    log_level: str = "info"
    log_format: LogFormat = "text"
    run_dir: str = ""  # 0700, sockets; made by the supervisor
    shm_dir: str = ""  # 0700 below /dev/shm, adapter images; made by the supervisor
    supervisor_pid: int = 0  # children end with it; 0: whoever started them
    epoch: int = 0  # how often the process that reads this was started before
