"""Which adapters may be loaded: below which directories, and whether from the hub. The loader, which reads them, asks.

It is decided there and not where a request arrives, so that every way to load is bound by it, the files are opened
where the decision was made, and no slow disk stalls whoever talks to clients.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

from manylora.runtime.config import ServerConfig
from manylora.runtime.errors import AdapterPathForbiddenError

HUB_ID = re.compile(r"[A-Za-z0-9][\w.\-]*(/[A-Za-z0-9][\w.\-]*)?")
_SHOWN_CHARACTERS = 200  # of a path in an error


class Permit(NamedTuple):
    """Leave to read one adapter.

    path: its directory or hub id; absolute and free of links where there is a root.
    root: the directory, free of links, below which each of its files must really lie; "": anywhere.
    hub_only: `path` is a hub id, even where a directory is called so.
    """

    path: str
    root: str = ""
    hub_only: bool = False


class AdapterAccess:
    """The rule of one server.

    Without keys, on a loopback address and without --adapter-root any path and hub id may be loaded. Else what
    --lora-paths named, by the same text; directories that really lie below an --adapter-root; hub ids with --allow-hub.
    """

    def __init__(self, config: ServerConfig) -> None:
        access = config.access
        self._anything = config.http.is_loopback and not access.asks_for_keys and not access.adapter_root
        self._named = frozenset(one.lora_path for one in config.lora.lora_paths)
        self._roots = access.adapter_root
        self._hub = access.allow_hub

    def permit(self, lora_path: str) -> Permit:
        """Decide about `lora_path`. Raises AdapterPathForbiddenError, whether or not there is such a path.

        A relative path is taken from each root in turn and then from the working directory; a directory that exists
        goes before a hub id of its name. `~` stands for nothing: whose home would it be?
        """
        if self._anything or lora_path in self._named:
            return Permit(lora_path)
        below = self._below_roots(lora_path)
        for permit in below:
            if os.path.isdir(permit.path):
                return permit
        if self._hub and HUB_ID.fullmatch(lora_path):
            return Permit(lora_path, hub_only=True)
        if below:
            return below[0]  # there is no such directory, and it may be said so
        hub = "" if self._hub else "; hub ids need --allow-hub"
        raise AdapterPathForbiddenError(
            f"{lora_path[:_SHOWN_CHARACTERS]!r} may not be loaded: it is neither below an --adapter-root nor named by "
            f"--lora-paths{hub}",
            param="lora_path",
        )

    def _below_roots(self, lora_path: str) -> list[Permit]:
        """Where `lora_path` may stand for, best first. What is outside is not even looked at: `..` is taken by the text,
        and only what is below a root by its text, as given or as it really is, is followed to where it really leads.
        """
        roots = [(os.path.abspath(root), os.path.realpath(root)) for root in self._roots]
        permits: list[Permit] = []
        try:
            for base in (*self._roots, os.curdir):
                place = os.path.abspath(os.path.join(base, lora_path))
                for root, real_root in roots:
                    if _is_below(place, root) or _is_below(place, real_root):
                        permits.append(Permit(os.path.realpath(place), real_root))
        except ValueError:  # a null byte, or a lone surrogate
            return []
        return [permit for permit in permits if _is_below(permit.path, permit.root)]


def check_below(path: str, root: str) -> None:
    """Raise AdapterPathForbiddenError unless `path` (free of links) is `root` or below it. No root: nothing to check."""
    if root and not _is_below(path, root):
        raise AdapterPathForbiddenError(
            "a file of the adapter is a link that leads out of --adapter-root", param="lora_path"
        )


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root.rstrip("/") + "/")
