"""Names, versions and leases of adapters, and the way of each version from a file to the workers.

    load:    LoadJob ─ AdapterImage ─ StageAdapter ─ every rank AdapterStaged ─ the name points to the version
    use:     lease ─ (host copy lost: LoadJob with the digest, staged again) ─ CopyAdapter ─ every rank AdapterCopied
    unload:  the name is gone at once; without a lease left, the version dies and everything of it is freed
    replace: a load whose version takes over a name in use; the old version lives on its leases

A version in the middle of a staging or a copy cannot die before every rank has answered.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable

from manylora.runtime.errors import (
    AdapterChangedError,
    AdapterLimitError,
    ErrorInfo,
    VersionConflictError,
    WorkerCrashedError,
)
from manylora.runtime.messages import (
    AdapterCopied,
    AdapterImage,
    AdapterStaged,
    LoadAdapter,
    LoadFailed,
    LoadJob,
)
from manylora.scheduler.adapter_calls import check_version
from manylora.scheduler.adapter_limits import FitChecker
from manylora.scheduler.adapter_teller import AdapterTeller
from manylora.scheduler.device_tier import DeviceTier
from manylora.scheduler.host_tier import HostTier
from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.outbox import Outbox
from manylora.scheduler.prefix_tree import PrefixTree
from manylora.scheduler.sequence import Phase, Sequence
from manylora.scheduler.times import Times
from manylora.scheduler.unloads import Unloads
from manylora.scheduler.version import DeviceCopy, HostCopy, Load, Version

logger = logging.getLogger(__name__)


class AdapterTable:
    """`live_sequences` gives every sequence that has not ended; `end_sequences(sequences, error)` ends some of them, whose
    version could not be made ready or is taken away.
    """

    def __init__(
        self,
        *,
        host: HostTier,
        device: DeviceTier,
        tree: PrefixTree,
        fit: FitChecker,
        clock: StepClock,
        times: Times,
        outbox: Outbox,
        live_sequences: Callable[[], Iterable[Sequence]],
        end_sequences: Callable[[list[Sequence], ErrorInfo], None],
    ) -> None:
        self.names: dict[str, Version] = {}  # in load order
        self.versions: dict[int, Version] = {}  # every one that lives, loads under way included
        self.loads: dict[str, Load] = {}  # by name
        self.pinned: list[Version] = []  # those being loaded included
        self.unloads = Unloads()
        self.awaited: Counter[str] = Counter()  # names that calls will use, each as often as one does
        self._jobs: dict[int, Load | Version] = {}
        self._num_jobs = 0
        self._num_versions = 0
        self._host = host
        self._device = device
        self._tree = tree
        self._fit = fit
        self._clock = clock
        self._times = times
        self._outbox = outbox
        self._live_sequences = live_sequences
        self._end_sequences = end_sequences
        self.teller = AdapterTeller(self.names, live_sequences, times, outbox)

    @property
    def busy(self) -> bool:
        """A load, a staging or a copy is under way."""
        return bool(self.loads or self._jobs) or any(
            version.host in (HostCopy.QUEUED, HostCopy.STAGING) or version.device is DeviceCopy.COPYING
            for version in self.versions.values()
        )

    # ---- leases -------------------------------------------------------------------------------------------------

    def count_request(self, version: Version) -> None:
        """A request for it has been accepted."""
        version.record.requests += 1
        version.record.hits += version.device is DeviceCopy.RESIDENT

    def touch(self, version: Version) -> None:
        """It is in use now: others are to be evicted before it."""
        version.last_use = self._clock.use()

    def lease(self, version: Version) -> None:
        version.leases += 1
        version.record.leases += 1
        self.touch(version)

    def release(self, version: Version) -> None:
        assert version.leases > 0
        record = version.record
        version.leases -= 1
        record.leases -= 1
        self.touch(version)
        record.last_use, record.idle_since = self._times.since_1970(), self._times.now()
        self.unloads.watch(record)
        self.settle(version)

    def start_load(self, call: LoadAdapter) -> None:
        """A load that was checked."""
        self.loads[call.lora_name] = load = Load(call)
        self._start_job(load, call.lora_name, call.lora_path)

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
        version = Version.of(self._num_versions, load.call, image)
        self.touch(version)
        replaced = self.names.get(version.name)
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
        self._host.staged(version)
        load = self.loads.get(version.name)
        if load is not None and load.version is version:
            self._finish_load(load, version)
        elif error := version.acks.error:
            self._host.drop(version)
            self._lose_host_copy(version, error)
        self.settle(version)

    def _finish_load(self, load: Load, version: Version) -> None:
        """Every rank has staged it: the name is its own, unless a rank failed or the name has moved on meanwhile."""
        error, replaced = version.acks.error, self.names.get(version.name)
        if error is None:
            try:
                check_version(version.name, load.call.if_version, replaced)
            except VersionConflictError as conflict:
                error = conflict.info()
        if error is not None:
            self._host.drop(version)
            self.set_pin(version, False)
            del self.versions[version.id]
            self._end_load(load, error)
            return
        self._register(version, load.call.ttl_s, replaced)
        self._end_load(load, None, replaced)

    def on_copied(self, answer: AdapterCopied) -> None:
        version = self.versions[answer.version]
        assert version.device is DeviceCopy.COPYING
        if not version.acks.add(answer.error):
            return
        self._device.copied(version)
        if error := version.acks.error:
            self._end_waiting(version, error)
        self.settle(version)

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
        """Bring every pinned adapter into memory; False while one waits for room. One that was pinned when its host copy
        was gone is read again first, which holds up nobody.
        """
        ready = True
        for version in self.pinned:
            if version.named and not version.failed and self.want(version):
                ready &= self._device.make_resident(version)
        return ready

    # ---- ends ---------------------------------------------------------------------------------------------------

    def _register(self, version: Version, ttl_s: float | None, replaced: Version | None) -> None:
        if replaced is not None:
            del self.names[version.name]
            version.record = replaced.record
        self.names[version.name] = version
        version.named, version.loaded_at = True, self._times.since_1970()
        record = version.record
        record.ttl_s, record.awaited = ttl_s, self.awaited[version.name]
        record.idle_since = self._times.now()
        self.unloads.watch(record)
        logger.info(
            "LoRA adapter loaded: %s from %s (version %d, rank %d, %d pages)",
            version.name,
            version.path,
            version.id,
            version.max_rank,
            version.num_pages,
        )
        if replaced is not None:
            self.retire(replaced)

    def _end_load(self, load: Load, error: ErrorInfo | None, replaced: Version | None = None) -> None:
        name = load.call.lora_name
        del self.loads[name]
        if error is not None and name in self.names:
            self.unloads.watch(self.names[name].record)  # it could not expire meanwhile
        self.teller.reply(load.call.call, error, None if error else load.version, replaced)

    def retire(self, version: Version) -> None:
        """Its name is gone; it lives on its leases."""
        version.named = False
        self.set_pin(version, False)
        self.settle(version)

    def set_pin(self, version: Version, pinned: bool) -> None:
        """Pin a version that may be pinned, which also tries anew what failed before, or let go of its pin."""
        if pinned:
            version.failed = False
        if pinned and not version.pinned:
            self.pinned.append(version)
        elif version.pinned and not pinned:
            self.pinned.remove(version)
        version.pinned = pinned

    def _lose_host_copy(self, version: Version, error: ErrorInfo) -> None:
        version.host = HostCopy.NONE
        version.failed = True
        self._end_waiting(version, error)
        self.settle(version)

    def _end_waiting(self, version: Version, error: ErrorInfo) -> None:
        """It could not be made ready for those that wait for it."""
        waiting = [s for s in self._live_sequences() if s.version is version and s.phase is Phase.WAITING]
        self._end_sequences(waiting, error)

    def settle(self, version: Version) -> None:
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
        for unload in self.unloads.take_done(self.versions.values()):
            if unload.call is not None:
                self.teller.reply(unload.call, None, unload.version)
