"""The thread that removes adapter images: freeing one's memory takes as long as a step, which must not wait for it."""

from __future__ import annotations

import logging
import os
import queue
import threading
from collections.abc import Iterable

logger = logging.getLogger("manylora.scheduler")


class FileRemover:
    """Removes files in the order given. What is left when the process ends goes with its directory."""

    def __init__(self) -> None:
        self._paths: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="remover", daemon=True).start()

    def remove(self, paths: Iterable[str]) -> None:
        """Returns at once; a file that is not there is no error."""
        for path in paths:
            self._paths.put(path)

    def _run(self) -> None:
        while True:
            path = self._paths.get()
            try:
                os.unlink(path)
            except FileNotFoundError:  # a loader that died may not have left it
                pass
            except OSError:
                logger.exception("%s could not be removed", path)
