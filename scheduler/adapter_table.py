"""Names, versions and leases of adapters, and the way of each version from a file to the workers.

    load:    LoadJob ─ AdapterImage ─ StageAdapter ─ every rank AdapterStaged ─ the name points to the version
    use:     lease ─ (host copy lost: LoadJob with the digest, staged again) ─ CopyAdapter ─ every rank AdapterCopied
    unload:  the name is gone at once; without a lease left, the version dies and everything of it is freed
    replace: a load whose version takes over a name in use; the old version lives on its leases

A version in the middle of a staging or a copy cannot die before every rank has answered.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from manylora.runtime.config import LoRAArgs
from manylora.runtime.errors import (
    AdapterChangedError,
    AdapterLimitError,
    ErrorInfo,
    ManyloraError,
    WorkerCrashedError,
)
from manylora.runtime.messages import (
    NO_VERSION,
    AdapterCopied,
    AdapterImage,
    AdapterReply,
    AdapterStaged,
    LoadAdapter,
    LoadFailed,
    LoadJob,
    UnloadAdapter,
)
from manylora.scheduler.adapter_calls import check_load, check_requested, check_unload
from manylora.scheduler.adapter_limits import FitChecker
from manylora.scheduler.device_tier import DeviceTier
from manylora.scheduler.host_tier import HostTier
from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.prefix_tree import PrefixTree
from manylora.scheduler.sequence import Sequence
from manylora.scheduler.version import DeviceCopy, HostCopy, Version

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Load:
    """A LoadAdapter call under way; `version` from the moment its image is there."""

    call: LoadAdapter
    version: Version | None = None


class AdapterTable:
    """`on_unavailable(version, error)` is called when a version that requests wait for could not be made ready;
    `live_sequences` gives every sequence that has not ended.
    """

    def __init__(
        self,
        args: LoRAArgs,
        *,
        host: HostTier,
        device: DeviceTier,
        tree: PrefixTree,
        fit: FitChecker,
        clock: StepClock,
        outbox: Outbox,
        live_sequences: Callable[[], Iterable[Sequence]],
        on_unavailable: Callable[[Version, ErrorInfo], None],
    ) -> None:
        self._enabled = args.enable_lora or bool(args.lora_paths)
        self.names: dict[str, Version] = {}  # in load order
        self.versions: dict[int, Version] = {}  # every one that lives, loads under way included
        self.loads: dict[str, Load] = {}  # by name
        self.pinned: list[Version] = []  # those being loaded included
        self._max_pinned = args.max_loras_per_batch - 1
        self._jobs: dict[int, Load | Version] = {}
        self._num_jobs = 0
        self._num_versions = 0
        self._host = host
        self._device = device
        self._tree = tree
        self._fit = fit
        self._clock = clock
        self._outbox = outbox
        self._live_sequences = live_sequences
        self._on_unavailable = on_unavailable

    @property
    def busy(self) -> bool:
        """A load, a staging or a copy is under way."""
        return bool(self.loads or self._jobs) or any(
            version.host in (HostCopy.QUEUED, HostCopy.STAGING) or version.device is DeviceCopy.COPYING
            for version in self.versions.values()
        )

    # ---- leases -------------------------------------------------------------------------------------------------

    def check_requested(self, names: set[str]) -> None:
        """Raise unless every name stands for a version now."""
        check_requested(names, self.names, enabled=self._enabled)

    def touch(self, version: Version) -> None:
        """It is in use now: others are to be evicted before it."""
        version.last_use = self._clock.use()

    def lease(self, version: Version) -> None:
        version.leases += 1
        self.touch(version)

    def release(self, version: Version) -> None:
        assert version.leases > 0
        version.leases -= 1
        self.touch(version)
        self._settle(version)

    # ---- calls --------------------------------------------------------------------------------------------------

    def on_load(self, call: LoadAdapter) -> None:
        try:
            loading = {name: load.call for name, load in self.loads.items()}
            check_load(call, self.names, loading, enabled=self._enabled, max_pinned=self._max_pinned)
        except ManyloraError as error:
            self._reply(call.call, error.info())
            return
        self.loads[call.lora_name] = load = Load(call)
        self._start_job(load, call.lora_name, call.lora_path)

    def on_unload(self, call: UnloadAdapter) -> None:
        try:
            check_unload(call.lora_name, self.names, enabled=self._enabled)
        except ManyloraError as error:
            self._reply(call.call, error.info())
            return
        version = self.names.pop(call.lora_name)
        version.unload_calls.append(call.call)
        self._retire(version)

    # ---- loader -------------------------------------------------------------------------------------------------

    def on_image(self, image: AdapterImage) -> None:
        owner = self._jobs.pop(image.job, None)
        if owner is None:  # whoever wanted it is gone
            self._outbox.released_images.append(image.path)
        elif isinstance(owner, Load):
            self._accept_new(owner, image)
        elif image.digest != owner.digest:
            self._outbox.released_images.append(image.path)
            message = f"LoRA adapter {owner.name}: the files at {owner.path} changed since it was loaded."
            self._lose_host_copy(owner, AdapterChangedError(message).info())
        else:
            self._host.enqueue(owner, image)

    def on_load_failed(self, failure: LoadFailed) -> None:
        self._fail_job(failure.job, failure.error)

    def on_loader_lost(self) -> None:
        error = WorkerCrashedError("The process that reads adapters died.").info()
        for job in list(self._jobs):
            self._fail_job(job, error)

    def _accept_new(self, load: Load, image: AdapterImage) -> None:
        self._num_versions += 1
        call = load.call
        version = Version(
            id=self._num_versions,
            name=call.lora_name,
            path=call.lora_path,
            pinned=call.pinned,
            digest=image.digest,
            num_pages=image.num_pages,
            num_slices=image.num_slices,
            max_rank=max(rank for layer in image.ranks for rank in layer),
            last_use=self._clock.use(),
        )
        replaced = self.names.get(call.lora_name)
        try:
            self._fit.check_adapter(version, self.versions.values(), self._live_sequences(), replaced)
        except AdapterLimitError as error:
            self._outbox.released_images.append(image.path)
            self._end_load(load, error.info())
            return
        self.versions[version.id] = version
        if version.pinned:
            self.pinned.append(version)
        load.version = version
        self._host.enqueue(version, image)

    def _fail_job(self, job: int, error: ErrorInfo) -> None:
        owner = self._jobs.pop(job, None)
        if isinstance(owner, Load):
            self._end_load(owner, error)
        elif owner is not None:
            self._lose_host_copy(owner, error)

    def _start_job(self, owner: Load | Version, name: str, path: str, digest: str = "") -> None:
        self._num_jobs += 1
        self._jobs[self._num_jobs] = owner
        self._outbox.to_loader.append(LoadJob(self._num_jobs, path, digest, name))

    # ---- workers ------------------------------------------------------------------------------------------------

    def on_staged(self, answer: AdapterStaged) -> None:
        version = self.versions[answer.version]
        assert version.host is HostCopy.STAGING
        if not version.acks.add(answer.error):
            return
        error = version.acks.error
        self._host.staged(version)
        if error:
            self._host.drop(version)
        load = self.loads.get(version.name)
        if load is not None and load.version is version:
            if error:
                self._unpin(version)
                del self.versions[version.id]
            else:
                self._register(version)
            self._end_load(load, error)
        elif error:
            self._on_unavailable(version, error)
        self._settle(version)

    def on_copied(self, answer: AdapterCopied) -> None:
        version = self.versions[answer.version]
        assert version.device is DeviceCopy.COPYING
        if not version.acks.add(answer.error):
            return
        self._device.copied(version)
        if error := version.acks.error:
            self._on_unavailable(version, error)
        self._settle(version)

    # ---- residency ----------------------------------------------------------------------------------------------

    def want(self, version: Version) -> bool:
        """True if its weights are resident, being copied, or on the host; else see that they get there."""
        if version.device is not DeviceCopy.NONE or version.host is HostCopy.STAGED:
            return True
        if version.host is HostCopy.NONE:
            version.host = HostCopy.LOADING
            self._start_job(version, version.name, version.path, version.digest)
        return False

    def pins_ready(self) -> bool:
        """Bring every pinned adapter into memory; False while one waits for room."""
        ready = True
        for version in self.pinned:
            if version.named and not version.copy_failed:
                ready &= self._device.make_resident(version)
        return ready

    # ---- ends ---------------------------------------------------------------------------------------------------

    def _register(self, version: Version) -> None:
        old = self.names.pop(version.name, None)
        self.names[version.name] = version
        version.named = True
        logger.info(
            "LoRA adapter loaded: %s from %s (version %d, rank %d, %d pages)",
            version.name,
            version.path,
            version.id,
            version.max_rank,
            version.num_pages,
        )
        if old is not None:
            self._retire(old)

    def _end_load(self, load: Load, error: ErrorInfo | None) -> None:
        del self.loads[load.call.lora_name]
        done = load.version if error is None else None
        self._reply(load.call.call, error, done.id if done else NO_VERSION)

    def _retire(self, version: Version) -> None:
        """Its name is gone; it lives on its leases."""
        version.named = False
        self._unpin(version)
        self._settle(version)

    def _unpin(self, version: Version) -> None:
        if version.pinned:
            self.pinned.remove(version)
            version.pinned = False

    def _lose_host_copy(self, version: Version, error: ErrorInfo) -> None:
        version.host = HostCopy.NONE
        self._on_unavailable(version, error)
        self._settle(version)

    def _settle(self, version: Version) -> None:
        """After a change: bury the version if it is dead, and let others have the host memory that became free."""
        under_way = version.host is HostCopy.STAGING or version.device is DeviceCopy.COPYING
        if not (version.named or version.leases or under_way) and version.id in self.versions:
            self._bury(version)
        self._host.pump()

    def _bury(self, version: Version) -> None:
        """Free everything of a version that nobody can reach any more, and answer who waits for that."""
        self._device.drop(version)
        self._host.drop(version)
        self._tree.drop(version.id)
        self._jobs = {job: owner for job, owner in self._jobs.items() if owner is not version}
        del self.versions[version.id]
        logger.info("LoRA adapter unloaded: %s (version %d)", version.name, version.id)
        for call in version.unload_calls:
            self._reply(call, None)

    def _reply(self, call: int, error: ErrorInfo | None, version: int = NO_VERSION) -> None:
        loaded = {name: v.path for name, v in self.names.items()}
        self._outbox.to_front.append(AdapterReply(call, loaded, error, version))
