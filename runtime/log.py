"""Logging set-up: one format for every process, with its name."""

from __future__ import annotations

import logging
import sys


def setup_logging(process: str, level: str = "info") -> None:
    """Log to stderr as `[time process] message`. Call once at a process's start."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(f"[%(asctime)s {process}] %(message)s", datefmt="%Y-%m-%d %H:%M:%S")
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("manylora").setLevel(level.upper())
    logging.captureWarnings(True)
