"""One log line per interval while there is work."""

from __future__ import annotations

import logging
from collections.abc import Callable

from manylora.scheduler.memory import Memory
from manylora.scheduler.roster import Roster

logger = logging.getLogger(__name__)
INTERVAL = 10.0  # seconds


class Progress:
    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._tokens = 0

    def add(self, tokens: int, roster: Roster, memory: Memory) -> None:
        """Count a completed step's drawn tokens; log if the interval is over."""
        self._tokens += tokens
        now = self._clock()
        if now - self._since < INTERVAL:
            return
        logger.info(
            "running %d, waiting %d, adapters running %d, %.0f tokens/s, pages: %d free, %d cached of %d",
            len(roster.running),
            len(roster.waiting),
            roster.num_active,
            self._tokens / (now - self._since),
            memory.pages.num_free,
            memory.num_cached,
            memory.pages.size,
            extra={
                "running": len(roster.running),
                "waiting": len(roster.waiting),
                "adapters_running": roster.num_active,
                "tokens_per_s": round(self._tokens / (now - self._since), 1),
                "pages_free": memory.pages.num_free,
                "pages_cached": memory.num_cached,
            },
        )
        self._since, self._tokens = now, 0
