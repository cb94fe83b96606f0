"""The dashboard's files over HTTP: complete, of the right type, not sent twice, and without a way around the policy."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from manylora.runtime.http import dashboard_routes
from tests.runtime.http_front import served
from tests.tokenizer_manager.fake_scheduler import VOCAB_SIZE, in_loop
from tests.tokenizer_manager.tiny_tokenizer import save_byte_level

FOLDER = Path(dashboard_routes.__file__).parent / "dashboard"
TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FILES = sorted(path.name for path in FOLDER.iterdir() if path.name != "index.html")
MAX_LINES = 300
# Ways from a text to markup or code, and addresses of others.
FORBIDDEN = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|new Function|srcdoc|\bstyle=|\bon\w+=\"|https?://(?!www\.w3\.org/2000/svg)"
)


@pytest.fixture(scope="module")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("tokenizer"), VOCAB_SIZE)


@in_loop
async def test_every_file_comes_with_its_type_and_the_policy(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        for name in ["", *FILES]:
            async with front.client.get(f"/dashboard/{name}" if name else "/") as response:
                assert response.status == 200, name
                expected = TYPES[Path(name).suffix] if name else "text/html"
                assert response.headers["Content-Type"] == f"{expected}; charset=utf-8"
                assert await response.read() == (FOLDER / (name or "index.html")).read_bytes()
                policy = response.headers["Content-Security-Policy"].split("; ")
                assert {"default-src 'none'", "script-src 'self'", "frame-ancestors 'none'"} <= set(policy)
                assert not [rule for rule in policy if "unsafe" in rule or "http" in rule or "*" in rule]
                assert response.headers["X-Content-Type-Options"] == "nosniff"


@in_loop
async def test_a_browser_that_has_a_file_is_told_so(tokenizer_dir: Path) -> None:
    async with served(tokenizer_dir) as front:
        tags: set[str] = set()
        for path in ("/", "/dashboard/page.css"):
            async with front.client.get(path) as response:
                assert response.headers["Cache-Control"] == "no-cache"
                tag = response.headers["ETag"]
            tags.add(tag)
            for sent, status in ((tag, 304), (f'W/{tag}, "other"', 304), ('"other"', 200), ("*", 304)):
                async with front.client.get(path, headers={"If-None-Match": sent}) as response:
                    assert response.status == status, sent
                    assert response.headers["ETag"] == tag
                    assert bool(await response.read()) is (status == 200)
        assert len(tags) == 2


@pytest.mark.parametrize(
    "path", ["/dashboard/", "/dashboard/other.js", "/dashboard/index.html", "/dashboard/..%2froute.py"]
)
@in_loop
async def test_nothing_else_is_a_file_of_it(tokenizer_dir: Path, path: str) -> None:
    async with served(tokenizer_dir) as front, front.client.get(path) as response:
        assert response.status == 404


def test_all_that_the_page_names_is_there() -> None:
    named = set(re.findall(r'(?:href|src)="dashboard/([^"]+)"', (FOLDER / "index.html").read_text()))
    for name in FILES:
        named |= set(re.findall(r'from "\./([^"]+)"', (FOLDER / name).read_text()))
    assert named == set(FILES)


def test_ids_that_the_scripts_look_for_are_in_the_page() -> None:
    page = (FOLDER / "index.html").read_text()
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    scripts = "\n".join((FOLDER / name).read_text() for name in FILES if name.endswith(".js"))
    assert set(re.findall(r'byId\("([^"]+)"\)', scripts)) <= set(ids)
    labelled = re.findall(r'aria-labelledby="([^"]+)"', page)
    assert set(labelled) <= set(ids)


@pytest.mark.parametrize("name", ["index.html", *FILES])
def test_files_are_short_and_make_no_markup_of_texts(name: str) -> None:
    text = (FOLDER / name).read_text()
    assert len(text.splitlines()) <= MAX_LINES
    assert FORBIDDEN.findall(text) == []
