"""Which adapters may be loaded: the decision, over real directories and links."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from manylora.runtime.adapter_access import AdapterAccess, Permit, check_below
from manylora.runtime.errors import AdapterPathForbiddenError
from manylora.runtime.flags import config_from_kwargs


def access(**flags: Any) -> AdapterAccess:
    """The rule of a server with these flags; it started with the adapter `named/at/start`."""
    return AdapterAccess(config_from_kwargs(model_path="m", lora_paths=["named=named/at/start"], **flags))


def forbidden(rule: AdapterAccess, path: str) -> str:
    """The refusal's message, but for the path."""
    with pytest.raises(AdapterPathForbiddenError) as caught:
        rule.permit(path)
    assert (caught.value.code, caught.value.status, caught.value.param) == (
        "adapter_path_forbidden",
        403,
        "lora_path",
    )
    return caught.value.message.replace(repr(path), "")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two roots with adapters, one outside, and links every way; the working directory is that of all of them."""
    for name in ("one/a", "one/deep/b", "two/a", "two/c", "outside/secret", "one-and-more/d", "org/name"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "one/file").write_text("x")
    (tmp_path / "one/inside").symlink_to("deep/b")
    (tmp_path / "one/leads-out").symlink_to(tmp_path / "outside/secret")
    (tmp_path / "one/dangling").symlink_to(tmp_path / "outside/nothing")
    (tmp_path / "one/loop").symlink_to("loop")
    (tmp_path / "alias").symlink_to("one")
    (tmp_path / "outside/back").symlink_to(tmp_path / "one/a")
    monkeypatch.chdir(tmp_path)
    return tmp_path


ANYTHING = ["/etc", "relative", "org/name", "../x", "~/x", "named/at/start", ""]


@pytest.mark.parametrize("flags", [{}, {"host": "localhost"}, {"host": "::1"}, {"allow_hub": True}])
def test_at_home_everything_may_be_loaded(flags: dict[str, Any]) -> None:
    assert [access(**flags).permit(path) for path in ANYTHING] == [Permit(path) for path in ANYTHING]


@pytest.mark.parametrize(
    "flags",
    [
        {"host": "0.0.0.0", "insecure": True},
        {"api_key_file": "keys"},
        {"admin_key_file": "keys"},
        {"host": "::", "api_key_file": "keys"},
    ],
)
def test_elsewhere_only_what_was_named_at_start(tree: Path, flags: dict[str, Any]) -> None:
    rule = access(**flags)
    assert rule.permit("named/at/start") == Permit("named/at/start")
    paths = [
        str(tree / "one/a"),
        "one/a",
        "org/name",
        "named/at/../at/start",
        "./named/at/start",
        "named",
        "",
    ]
    assert len({forbidden(rule, path) for path in paths}) == 1


def test_only_below_a_root(tree: Path) -> None:
    rule = access(adapter_root=["one", str(tree / "two")])
    one, two = str(tree / "one"), str(tree / "two")
    allowed = {
        "a": Permit(f"{one}/a", one),  # the first root that has it
        "c": Permit(f"{two}/c", two),
        "deep/b": Permit(f"{one}/deep/b", one),
        "deep/../a": Permit(f"{one}/a", one),
        "one/a": Permit(f"{one}/a", one),  # from the working directory
        "two/../one/deep/b": Permit(f"{one}/deep/b", one),
        f"{one}/a/": Permit(f"{one}/a", one),
        f"{two}/a": Permit(f"{two}/a", two),
        one: Permit(one, one),
        "inside": Permit(f"{one}/deep/b", one),
        "leads-out/../a": Permit(f"{one}/a", one),  # `..` by the text
        "one/leads-out": Permit(f"{one}/one/leads-out", one),  # from the working directory it would lead out
        "new": Permit(f"{one}/new", one),  # to be told that there is none
        "~": Permit(f"{one}/~", one),
        "loop": Permit(f"{one}/loop", one),
        "org/name": Permit(f"{one}/org/name", one),  # no hub id, and not that of the working directory
        "named/at/start": Permit("named/at/start"),
    }
    assert {path: rule.permit(path) for path in allowed} == allowed


def test_nothing_tells_what_is_outside(tree: Path) -> None:
    rule = access(adapter_root=["one"])
    refused = [
        "/",
        "/etc",
        "/no/such/directory",
        str(tree),
        str(tree / "outside/secret"),
        str(tree / "outside/nothing"),
        str(tree / "outside/back"),  # a link from outside to inside says that it is there
        str(tree / "one-and-more/d"),
        str(tree / "one/../outside/secret"),
        str(tree / "alias/a"),
        "/proc/self/cwd/one/a",
        "../outside/secret",
        "../outside/nothing",
        "leads-out",
        "leads-out/deeper",
        "dangling",
        "\0",
        "a\0b",
        "\ud800",
    ]
    assert len({forbidden(rule, path) for path in refused}) == 1


def test_a_root_that_is_a_link(tree: Path) -> None:
    rule, one = access(adapter_root="alias"), str(tree / "one")
    for path in ("a", "alias/a", str(tree / "alias/a"), str(tree / "one/a")):
        assert rule.permit(path) == Permit(f"{one}/a", one)
    os.replace(tree / "alias", tree / "old")
    (tree / "alias").symlink_to("two")
    assert rule.permit("c") == Permit(str(tree / "two/c"), str(tree / "two"))
    forbidden(rule, str(tree / "one/a"))


def test_hub_ids(tree: Path) -> None:
    """A directory below a root goes first; one elsewhere is never taken for the hub's."""
    (tree / "one/org/both").mkdir(parents=True)
    with_root = access(adapter_root=["one"], allow_hub=True)
    assert with_root.permit("org/both") == Permit(str(tree / "one/org/both"), str(tree / "one"))
    hub_only = access(admin_key_file="keys", allow_hub=True)
    for rule in (with_root, hub_only):
        for hub_id in ("org/name", "name-1.2"):
            assert rule.permit(hub_id) == Permit(hub_id, hub_only=True)
        for path in ("/etc", "../outside/secret", "http://host/../../../x"):
            assert "--allow-hub" not in forbidden(rule, path)
    for path in ("~/x", "http://host/x", "org/../name", "a/b/c"):
        forbidden(hub_only, path)
    for path in ("org/name", "/etc"):
        assert forbidden(access(admin_key_file="keys"), path).endswith("hub ids need --allow-hub")


def test_a_long_path_is_cut_in_the_refusal() -> None:
    with pytest.raises(AdapterPathForbiddenError) as caught:
        access(admin_key_file="keys").permit("/" + "x" * 100_000)
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("path", "root", "below"),
    [
        ("/a/b", "/a", True),
        ("/a", "/a", True),
        ("/ab", "/a", False),
        ("/", "/a", False),
        ("/b/a", "/a", False),
        ("/x", "/", True),
        ("/x", "", True),
    ],
)
def test_what_is_below(path: str, root: str, below: bool) -> None:
    if below:
        check_below(path, root)
    else:
        with pytest.raises(AdapterPathForbiddenError):
            check_below(path, root)
