"""The command line: `manylora serve --model-path M …`, `manylora adapters list …`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import manylora
from manylora.runtime.errors import ConfigError
from manylora.runtime.flags import parse_flags
from manylora.runtime.launch import serve

_USAGE = """\
usage: manylora serve --model-path MODEL [flags]   serve a model over HTTP (manylora serve --help: all flags)
       manylora adapters list|load|unload|pin      the adapters of a running server (manylora adapters --help)
       manylora --version
"""
_BAD_COMMAND_LINE = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    command, *rest = (sys.argv[1:] if argv is None else argv) or [""]
    if command == "--version":
        sys.stdout.write(f"manylora {manylora.__version__}\n")
        return 0
    if command in ("--help", "-h"):
        sys.stdout.write(_USAGE)
        return 0
    if command == "adapters":
        from manylora.runtime.adapters_cli import main as adapters  # a server needs none of it

        return adapters(rest)
    if command != "serve":
        sys.stderr.write(_USAGE)
        return _BAD_COMMAND_LINE
    try:
        config = parse_flags(rest)
    except ConfigError as error:
        sys.stderr.write(f"manylora: error: {error.message}\n")
        return _BAD_COMMAND_LINE
    return serve(config)
