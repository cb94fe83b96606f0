"""What the documents claim and a program can check: flags, routes, files they name, and links."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manylora.runtime.flags import FLAGS
from manylora.runtime.http.server import ROUTES
from manylora.runtime.sampling_params import SamplingParams

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = (
    "README.md",
    "CONTRIBUTING.md",
    "docs/architecture.md",
    "docs/metrics.md",
    "docs/errors.md",
    "demo/README.md",
)
_SOURCE_PATH = re.compile(
    r"`((?:runtime|tokenizer_manager|scheduler|tp_worker|lora|kernels|tests|scripts|docs)/[^`\s]*)`"
)
_LINK = re.compile(r"\]\(([^)#:]+)\)")


def table(first_column: str) -> dict[str, list[str]]:
    """The README's table whose header starts with `first_column`: first cell -> the other cells."""
    text = (ROOT / "README.md").read_text()
    body = text.split(f"| {first_column} |", 1)[1].split("\n\n", 1)[0].splitlines()[2:]
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in body]
    return {row[0]: row[1:] for row in rows}


def test_readme_lists_every_flag_with_its_default() -> None:
    rows = table("flag")
    assert list(rows) == [", ".join(f"`{name}`" for name in (flag.option, *flag.aliases)) for flag in FLAGS]
    for flag, (default, _) in zip(FLAGS, rows.values(), strict=True):
        if isinstance(flag.target.default, (int, float, str)) and flag.target.default not in (False, ""):
            assert default == f"`{flag.target.default}`", flag.option


def test_readme_lists_every_route_with_its_methods() -> None:
    methods: dict[str, list[str]] = {}
    for route in ROUTES:
        methods.setdefault(route.published_path, []).append(route.method)
    assert {path.strip("`"): cells[0] for path, cells in table("route").items()} == {
        path: ", ".join(sorted(names)) for path, names in methods.items()
    }


def test_readme_names_every_sampling_parameter() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in SamplingParams.__struct_fields__ if f"`{name}`" not in text] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_and_links_exist(document: str) -> None:
    text = (ROOT / document).read_text()
    named = [path for path in _SOURCE_PATH.findall(text) if not set(path) & set("{}<>*")]
    linked = [str(Path(document).parent / link) for link in _LINK.findall(text)]
    assert [path for path in named + linked if not (ROOT / path).exists()] == []
