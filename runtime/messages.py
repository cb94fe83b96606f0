"""Every message between two processes, grouped by who sends it to whom.

One union per direction (bottom of the file); each is a frozen tagged Struct. Columns of integers travel as packed bytes
(`pack_i32`, `pack_i64`). New fields go last, with a default. The plan of a step is in `runtime/plan.py`.

A *handle* is the front's number of one sequence (one sample of one request); it is never reused while a front lives.
A *version* is the scheduler's number of one set of adapter weights; it is never reused while a scheduler lives.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import msgspec

from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import ErrorInfo
from manylora.runtime.model_config import ModelConfig
from manylora.runtime.plan import ForwardBatch, ForwardOutput
from manylora.runtime.sampling_params import SamplingParams

NO_VERSION = 0  # the base model


def pack_i32(values: Iterable[int]) -> bytes:
    return array("i", values).tobytes()


def unpack_i32(data: bytes) -> array[int]:
    return array("i", data)


def pack_i64(values: Iterable[int]) -> bytes:
    return array("q", values).tobytes()


def unpack_i64(data: bytes) -> array[int]:
    return array("q", data)


def unpack_f32(data: bytes) -> array[float]:
    return array("f", data)


# ---- front -> scheduler -------------------------------------------------------------------------------------------


class GenerateReq(msgspec.Struct, frozen=True, omit_defaults=True):
    """One tokenized request. Sample k of `params.n` has handle `handle + k`.

    `logprob_start_len` counts prompt tokens; -1: none of the prompt's logprobs. `num_top` -1: no logprobs at all.
    `params.max_new_tokens` is always given here.
    """

    handle: int
    input_ids: bytes  # int32
    params: SamplingParams
    lora_name: str | None = None
    num_top: int = -1
    logprob_start_len: int = -1


class Submit(msgspec.Struct, frozen=True, tag=True):
    """The requests of one call: admitted whole, or refused whole by one `Rejected`."""

    requests: list[GenerateReq]


class Abort(msgspec.Struct, frozen=True, tag=True):
    """Stop these sequences: the client left, or a stop string ended them. No answer; unknown handles are ignored."""

    handles: bytes  # int64


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Answered by one AdapterReply. `if_version`: refused unless the name stands for this version, NO_VERSION for none,
    both when the load begins and when it is done. `ttl_s`: see AdapterState.
    """

    call: int
    lora_name: str
    lora_path: str
    pinned: bool = False
    replace: bool = False
    if_version: int | None = None
    ttl_s: float | None = None


class UpdateAdapter(msgspec.Struct, frozen=True, tag=True):
    """Change what is given, of an adapter that stays as it is. Answered by one AdapterReply, at once."""

    call: int
    lora_name: str
    pinned: bool | None = None
    ttl_s: float | msgspec.UnsetType | None = msgspec.UNSET
    if_version: int | None = None


class UnloadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Answered by one AdapterReply, once the last request that uses it has ended and everything is freed. After
    `drain_s` seconds the requests that have not ended get AdapterUnloadedError.
    """

    call: int
    lora_name: str
    drain_s: float | None = None
    if_version: int | None = None


class FlushCache(msgspec.Struct, frozen=True, tag=True):
    """Forget every cached prefix. Answered by Done; BusyError while anything runs or waits."""

    call: int


class GetState(msgspec.Struct, frozen=True, tag=True):
    """Answered by State."""

    call: int


# ---- scheduler -> front -------------------------------------------------------------------------------------------


class ServerInfo(msgspec.Struct, frozen=True, tag=True):
    """The first message: the engine is ready. Sizes as they came out."""

    model: ModelConfig
    dtype: str
    device: str
    context_length: int  # tokens of prompt and answer together
    max_total_tokens: int  # KV tokens the pool may hold
    num_pages: int
    page_bytes: int
    num_host_pages: int
    model_dir: str = ""  # what --model-path was resolved to
    tokenizer_dir: str = ""  # what --tokenizer-path was resolved to; model_dir if it was not given


class Finish(msgspec.Struct, frozen=True):
    """The one end of a sequence. `reason`: "stop" (with `matched`), "length", or "error" (with `error`)."""

    handle: int
    reason: str
    matched: int | None = None
    error: ErrorInfo | None = None


class Start(msgspec.Struct, frozen=True):
    """Sent with a sequence's first token: what it found cached, which weights answer, and the seconds from its arrival at
    the scheduler until it was first let into a step.
    """

    handle: int
    cached_tokens: int
    lora_version: int
    queue_s: float = 0.0


class LogprobChunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """Logprobs of consecutive tokens of one sequence; the top columns are (count, num_top), best first."""

    handle: int
    prompt: bool  # of prompt tokens, else of the generated tokens in the same message
    token_ids: bytes  # int32
    logprobs: bytes  # float32
    top_ids: bytes = b""  # int32
    top_logprobs: bytes = b""  # float32


class StepOutput(msgspec.Struct, frozen=True, tag=True, omit_defaults=True):
    """Everything one step means for the front: tokens[i] is the next token of handles[i].

    A token that ended its sequence (eos or stop id) is included. Order of handling: starts, tokens and logprobs,
    finishes.
    """

    handles: bytes  # int64
    tokens: bytes  # int32
    starts: list[Start] = []
    finishes: list[Finish] = []
    logprobs: list[LogprobChunk] = []


class Rejected(msgspec.Struct, frozen=True, tag=True):
    """None of the call's sequences was accepted; `handles` are the requests' first handles."""

    handles: bytes  # int64
    error: ErrorInfo


class AdapterReply(msgspec.Struct, frozen=True, tag=True):
    """`loaded` is name -> path in load order after the call; `lora_version` and `adapter`: of the one that the call was
    about, after an unload its last state; `replaced`: the version whose name a load took over.
    """

    call: int
    loaded: dict[str, str]
    error: ErrorInfo | None = None
    lora_version: int = NO_VERSION
    replaced: int = NO_VERSION
    adapter: AdapterState | None = None


class Done(msgspec.Struct, frozen=True, tag=True):
    call: int
    error: ErrorInfo | None = None


class AdapterState(msgspec.Struct, frozen=True):
    """One registered adapter. `tier`: "disk", "host" or "resident"; num_pages and leases are of this version.

    The counts from `running` on are of the name: they go on when it is replaced, and end when it is unloaded. running and
    waiting: sequences, those of replaced versions included; loads: copies into device pages; evictions: of those pages;
    requests: those accepted; hits: those of them that found it resident; tokens: generated; queue_s: seconds that its
    sequences waited for their first step, together.
    """

    lora_name: str
    lora_path: str
    version: int
    digest: str
    pinned: bool
    tier: str
    max_rank: int
    num_pages: int
    leases: int
    revision: str = ""  # of the hub, where it came from one
    modules: tuple[str, ...] = ()
    num_bytes: int = 0  # of its weights as stored in pages, all ranks together
    running: int = 0
    waiting: int = 0
    loads: int = 0
    evictions: int = 0
    hits: int = 0
    requests: int = 0
    tokens: int = 0
    queue_s: float = 0.0
    loaded_at: float = 0.0  # seconds since 1970
    last_use: float = 0.0  # the same, now while a request runs or waits; 0: never
    ttl_s: float | None = None  # it is unloaded when no request has run or waited for so many seconds


class State(msgspec.Struct, frozen=True, tag=True):
    """The scheduler's ledger. Pages: free + cached + held = total, always."""

    call: int
    running: int
    waiting: int
    leases: int
    pages_total: int
    pages_free: int
    pages_cached: int
    pages_held: int
    host_pages_total: int
    host_pages_free: int
    slots_free: int
    slices_free: int
    live_versions: int  # named ones and those kept by running requests
    steps: int
    preemptions: int
    adapters: list[AdapterState]
    pages_kv: int = 0  # that hold KV; the cached ones included
    pages_kv_cached: int = 0
    pages_adapters: int = 0  # of resident adapters and those being copied; the rest of the pages is free


# ---- scheduler -> loader, loader -> scheduler ---------------------------------------------------------------------


class LoadJob(msgspec.Struct, frozen=True, tag=True):
    """Resolve, validate and lay out. `digest`: of the registered version when it is read again, else "".

    `lora_name` only words the errors; without it they say the path.
    """

    job: int
    lora_path: str
    digest: str = ""
    lora_name: str = ""


class AdapterImage(msgspec.Struct, frozen=True, tag=True):
    """The adapter lies in file `path` (of `shm_dir`): tp_size images of num_pages · page_bytes each, rank after rank,
    laid out by `adapter_layout(geometry, ranks)`. The scheduler unlinks it once every worker has staged it.
    """

    job: int
    path: str
    digest: str
    ranks: tuple[tuple[int, ...], ...]  # [layer][module]
    scalings: tuple[tuple[float, ...], ...]  # [layer][module]
    num_pages: int
    num_slices: int
    revision: str = ""  # of the hub, where the files come from there
    num_bytes: int = 0  # of the weights in those pages, all ranks together


class LoadFailed(msgspec.Struct, frozen=True, tag=True):
    job: int
    error: ErrorInfo


class LoaderReady(msgspec.Struct, frozen=True, tag=True):
    pass


# ---- scheduler -> worker: one ordered stream, identical bytes to every rank ---------------------------------------


class StageAdapter(msgspec.Struct, frozen=True, tag=True):
    """Copy this rank's image into host pages and remember the layout. Answered by AdapterStaged. May be slow: done
    beside the step loop.
    """

    version: int
    path: str
    ranks: tuple[tuple[int, ...], ...]
    scalings: tuple[tuple[float, ...], ...]
    host_pages: bytes  # int32


class CopyAdapter(msgspec.Struct, frozen=True, tag=True):
    """Copy a staged version from host pages into `pages`, fill rows `slices` of the slice table. Answered by
    AdapterCopied once the copy is complete. The scheduler sends it only when no step in flight touches `pages`.
    """

    version: int
    pages: bytes  # int32
    slices: bytes  # int32


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Forget the host copy of a version. Its resident pages, if any, stay valid until the scheduler reuses them."""

    version: int


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    pass


# ---- worker -> scheduler ------------------------------------------------------------------------------------------


class WorkerReady(msgspec.Struct, frozen=True, tag=True):
    """Weights are loaded and the pools allocated. The scheduler uses the smallest numbers of all ranks."""

    tp_rank: int
    num_pages: int
    num_host_pages: int
    num_slices: int  # rows of the slice table
    device: str
    dtype: str


class AdapterStaged(msgspec.Struct, frozen=True, tag=True):
    tp_rank: int
    version: int
    error: ErrorInfo | None = None


class AdapterCopied(msgspec.Struct, frozen=True, tag=True):
    tp_rank: int
    version: int
    error: ErrorInfo | None = None


class WorkerFailed(msgspec.Struct, frozen=True, tag=True):
    """The worker cannot go on; it exits after this."""

    tp_rank: int
    error: ErrorInfo


# ---- supervisor -> front, scheduler; and what each child tells the supervisor -------------------------------------


class EngineFailed(msgspec.Struct, frozen=True, tag=True):
    """A process died: answer everything that waits with this error, then exit."""

    error: ErrorInfo


class ChildReady(msgspec.Struct, frozen=True, tag=True):
    pass


class ChildFailed(msgspec.Struct, frozen=True, tag=True):
    """Why a child is about to exit, in one line for the user."""

    error: ErrorInfo


class LoaderRestarted(msgspec.Struct, frozen=True, tag=True):
    """To the scheduler: the loader died and is started again; its pipe is now the one of this epoch."""

    epoch: int


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """From the preparing child: the config with every path, `auto` and -1 resolved on this machine."""

    config: ServerConfig


FrontToScheduler = Submit | Abort | LoadAdapter | UpdateAdapter | UnloadAdapter | FlushCache | GetState
SchedulerToFront = ServerInfo | StepOutput | Rejected | AdapterReply | Done | State
SchedulerToLoader = LoadJob | Shutdown
LoaderToScheduler = LoaderReady | AdapterImage | LoadFailed
SchedulerToWorker = ForwardBatch | StageAdapter | CopyAdapter | DropAdapter | Shutdown
WorkerToScheduler = WorkerReady | ForwardOutput | AdapterStaged | AdapterCopied | WorkerFailed
SupervisorToChild = Shutdown | EngineFailed | LoaderRestarted
ChildToSupervisor = ChildReady | ChildFailed | Prepared
