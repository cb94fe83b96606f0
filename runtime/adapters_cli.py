"""`manylora adapters list|load|unload|pin`: the adapters of a running server, from a shell.

Exit codes: 0 it is done; 1 the server refused; 2 the command line is wrong; 3 no answer.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from manylora.runtime.adapter_client import AdapterClient, NoAnswerError, read_key
from manylora.runtime.errors import ConfigError, RemoteError

_REFUSED, _BAD_COMMAND_LINE, _NO_ANSWER = 1, 2, 3
_UNBOUNDED = 1 << 16  # columns of output that is no terminal's: nothing is cut
Card = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code."""
    try:
        args = _parser().parse_args(argv)
    except SystemExit as end:  # argparse has said why
        return int(end.code or 0)
    try:
        key = read_key(args.admin_key_file) if args.admin_key_file else None
        client = AdapterClient(args.url, key, args.timeout)
        _show(args.run(client, args), as_json=args.json)
    except ConfigError as error:
        return _fail(error.message, _BAD_COMMAND_LINE)
    except RemoteError as error:
        return _fail(f"{error.message} ({error.info().code})", _REFUSED)
    except NoAnswerError as error:
        return _fail(str(error), _NO_ANSWER)
    except KeyboardInterrupt:
        return _fail("interrupted; what the server was asked for goes on", 130)
    return 0


# ---- commands -----------------------------------------------------------------------------------------------------


def _list(client: AdapterClient, _args: argparse.Namespace) -> list[Card]:
    return client.list()


def _load(client: AdapterClient, args: argparse.Namespace) -> Card:
    settings = {"path": args.path, "pinned": args.pinned, "ttl_s": args.ttl, "if_version": args.if_version}
    return client.load(args.name, settings)


def _unload(client: AdapterClient, args: argparse.Namespace) -> Card:
    settings = {"drain_s": args.drain, "force": args.force, "if_version": args.if_version}
    return client.unload(args.name, settings)


def _pin(client: AdapterClient, args: argparse.Namespace) -> Card:
    return client.update(args.name, {"pinned": not args.off, "if_version": args.if_version})


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--url", default="http://127.0.0.1:30000", help="of the server (default: %(default)s)"
    )
    common.add_argument("--admin-key-file", metavar="FILE", help="its first line is sent as the key")
    common.add_argument("--json", action="store_true", help="print the server's answer as JSON")
    common.add_argument("--timeout", type=float, metavar="S", help="give up after S seconds of silence")
    guard = argparse.ArgumentParser(add_help=False)
    guard.add_argument("name")
    guard.add_argument(
        "--if-version",
        type=int,
        metavar="N",
        help="only if the name is at version N (load: 0: only if it is free)",
    )
    parser = argparse.ArgumentParser(
        prog="manylora adapters", description="The adapters of a running server.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="list|load|unload|pin")

    def command(name: str, run: Callable[..., Any], text: str, *parents: argparse.ArgumentParser) -> Any:
        made = commands.add_parser(
            name, help=text, description=text, parents=[common, *parents], allow_abbrev=False
        )
        made.set_defaults(run=run)
        return made

    command("list", _list, "every loaded adapter")
    load = command("load", _load, "load an adapter, or replace the one of that name", guard)
    load.add_argument("path", help="a directory on the server's machine, or a hub id")
    load.add_argument("--pinned", action="store_true", help="keep it in device memory")
    load.add_argument(
        "--ttl", type=float, metavar="S", help="unload it when nobody has used it for S seconds"
    )
    unload = command("unload", _unload, "unload an adapter, and wait until nothing uses it any more", guard)
    ending = unload.add_mutually_exclusive_group()
    ending.add_argument("--drain", type=float, metavar="S", help="end what still uses it after S seconds")
    ending.add_argument("--force", action="store_true", help="end what uses it at once")
    pin = command("pin", _pin, "keep an adapter in device memory", guard)
    pin.add_argument("--off", action="store_true", help="do so no longer")
    return parser


# ---- output -------------------------------------------------------------------------------------------------------

# Heading, value, and whether it is a number.
_COLUMNS: tuple[tuple[str, Callable[[Card], str], bool], ...] = (
    ("NAME", lambda card: card["name"], False),
    ("VERSION", lambda card: str(card["version"]), True),
    ("TIER", lambda card: card["tier"] + (" pinned" if card["pinned"] else ""), False),
    ("RANK", lambda card: str(card["rank"]), True),
    ("SIZE", lambda card: _size(card["bytes"]), True),
    ("RUNNING", lambda card: str(card["running"]), True),
    ("WAITING", lambda card: str(card["waiting"]), True),
    ("REQUESTS", lambda card: str(card["requests"]), True),
    ("TOKENS", lambda card: str(card["tokens"]), True),
    ("LAST USE", lambda card: _ago(card["last_use"]), True),
    ("TTL", lambda card: "-" if card["ttl_s"] is None else _duration(card["ttl_s"]), True),
    ("FROM", lambda card: card["path"] + (f"@{card['revision'][:8]}" if card["revision"] else ""), False),
)


def _show(answer: Card | list[Card], *, as_json: bool) -> None:
    """JSON for a program; a table for a person, bare columns where it goes into a file or a pipe."""
    if as_json:
        sys.stdout.write(json.dumps(answer, indent=2) + "\n")
        return
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="backslashreplace")  # names are Unicode, a terminal may not be
    terminal = sys.stdout.isatty()
    console = Console(file=sys.stdout, width=None if terminal else _UNBOUNDED, highlight=False)
    table = Table(box=box.SIMPLE_HEAD if terminal else None, pad_edge=False)
    for heading, _, is_number in _COLUMNS:
        table.add_column(heading, justify="right" if is_number else "left", overflow="fold")
    for card in answer if isinstance(answer, list) else [answer]:
        table.add_row(*(Text(_harmless(value(card))) for _, value, _ in _COLUMNS))
    console.print(table)


def _fail(message: str, code: int) -> int:
    sys.stderr.write(f"manylora adapters: error: {_harmless(message)}\n")
    return code


def _harmless(text: str) -> str:
    """Without what a terminal would obey."""
    return "".join(one if one.isprintable() else " " if one == "\n" else ascii(one)[1:-1] for one in text)


def _size(count: int) -> str:
    amount, units = float(count), ["B", "KiB", "MiB", "GiB"]
    while amount >= 1024 and len(units) > 1:
        amount /= 1024
        del units[0]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _ago(moment: float | None) -> str:
    """`moment` by the server's clock, which need not be ours to the second."""
    return "never" if moment is None else f"{_duration(max(0.0, time.time() - moment))} ago"


def _duration(seconds: float) -> str:
    for length, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"
