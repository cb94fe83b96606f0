"""What the scheduler has to say, until its process sends it."""

from __future__ import annotations

from dataclasses import dataclass, field

from manylora.runtime.messages import SchedulerToFront, SchedulerToLoader, SchedulerToWorker
from manylora.scheduler.grammar import GrammarJob


@dataclass(slots=True)
class Outbox:
    """Messages in order; the process empties the lists. `released_images` are files to unlink."""

    to_front: list[SchedulerToFront] = field(default_factory=list[SchedulerToFront])
    to_workers: list[SchedulerToWorker] = field(default_factory=list[SchedulerToWorker])
    to_loader: list[SchedulerToLoader] = field(default_factory=list[SchedulerToLoader])
    to_grammars: list[GrammarJob] = field(default_factory=list[GrammarJob])
    released_images: list[str] = field(default_factory=list[str])
