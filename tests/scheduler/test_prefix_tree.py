"""The prefix tree by hand, pages of two tokens; and against a plain list of prefixes at random."""

from __future__ import annotations

import itertools
import random
from array import array

import pytest

from manylora.scheduler.id_pool import StepClock
from manylora.scheduler.prefix_tree import Node, PrefixTree

SIZE = 2


def packed(*tokens: int) -> bytes:
    return array("i", tokens).tobytes()


class Fixture:
    def __init__(self) -> None:
        self.freed: list[int] = []
        self.tree = PrefixTree(SIZE, StepClock(), self.freed.extend)

    def put(self, tokens: list[int], pages: list[int], namespace: int = 0) -> list[Node]:
        """Insert a prefix, the last page maybe partly filled."""
        nodes: list[Node] = []
        for index, page in enumerate(pages):
            key = packed(*tokens[index * SIZE : (index + 1) * SIZE])
            nodes.append(self.tree.insert(namespace, nodes[-1] if nodes else None, key, page))
        return nodes

    def hit(self, *tokens: int, limit: int | None = None, namespace: int = 0) -> tuple[list[int], int, int]:
        match = self.tree.match(namespace, packed(*tokens), len(tokens) if limit is None else limit)
        return [node.page for node in match.nodes], match.tail_page, match.tail_len


def test_a_hit_is_whole_pages_and_a_token_exact_tail() -> None:
    f = Fixture()
    f.put([1, 2, 3, 4, 5], [10, 11, 12])
    assert f.hit(1, 2, 3, 4, 5, 6) == ([10, 11], 12, 1)
    assert f.hit(1, 2, 3, 9) == ([10], 11, 1)
    assert f.hit(1, 2) == ([10], -1, 0)
    assert f.hit(1, 7) == ([], 10, 1)
    assert f.hit(9, 2) == ([], -1, 0)


def test_the_limit_cuts_inside_a_page() -> None:
    f = Fixture()
    f.put([1, 2, 3, 4], [10, 11])
    assert f.hit(1, 2, 3, 4, limit=3) == ([10], 11, 1)
    assert f.hit(1, 2, 3, 4, limit=2) == ([10], -1, 0)
    assert f.hit(1, 2, 3, 4, limit=0) == ([], -1, 0)


def test_namespaces_share_nothing() -> None:
    f = Fixture()
    f.put([1, 2], [10], namespace=1)
    assert f.hit(1, 2, namespace=2) == ([], -1, 0)
    assert f.hit(1, 2, namespace=1) == ([10], -1, 0)


def test_the_same_tokens_keep_the_first_page() -> None:
    f = Fixture()
    (first,) = f.put([1, 2], [10])
    (second,) = f.put([1, 2], [20])
    assert second is first
    assert f.tree.num_pages == 1


def test_a_longer_tail_replaces_a_shorter_one_and_a_shorter_adds_nothing() -> None:
    f = Fixture()
    f.put([1], [10])
    f.put([1, 2], [11])
    assert f.freed == [10]
    (found,) = f.put([1], [12])
    assert found.page == 11
    assert f.tree.num_pages == 1


def test_eviction_takes_the_idle_leaf_unused_for_longest() -> None:
    f = Fixture()
    old = f.put([1, 2, 3, 4], [10, 11])
    f.put([5, 6], [12])
    f.tree.lock(old)
    f.tree.unlock(old)  # now the youngest
    for expected in (12, 11, 10):
        leaf = f.tree.oldest_idle()
        assert leaf is not None
        f.tree.evict(leaf)
        assert f.freed[-1] == expected
    assert f.tree.oldest_idle() is None


def test_a_locked_path_is_not_evicted() -> None:
    f = Fixture()
    path = f.put([1, 2, 3, 4], [10, 11])
    f.tree.lock(path)
    assert f.tree.num_idle == 0
    assert f.tree.oldest_idle() is None
    f.tree.unlock(path)
    assert f.tree.num_idle == 2


def test_forget_spares_what_others_use() -> None:
    f = Fixture()
    path = f.put([1, 2, 3, 4], [10, 11])
    f.tree.lock(path[:1])
    f.tree.forget(path)
    assert f.freed == [11]
    assert f.hit(1, 2) == ([10], -1, 0)


def test_drop_frees_a_namespace_and_no_other() -> None:
    f = Fixture()
    f.put([1, 2, 3, 4], [10, 11], namespace=1)
    f.put([1, 2], [12], namespace=2)
    f.tree.drop(1)
    assert sorted(f.freed) == [10, 11]
    assert f.tree.num_pages == 1


def test_a_hit_adds_no_candidate() -> None:
    f = Fixture()
    path = f.put([1, 2], [10])
    for _ in range(1000):
        f.tree.lock(path)
        f.tree.unlock(path)
    assert len(f.tree._leaves) == 1  # pyright: ignore[reportPrivateUsage]


def test_candidates_that_are_gone_are_forgotten_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    f = Fixture()
    for first in range(1000):
        f.put([first, 0], [first], namespace=1)
    counted: list[int] = []
    forget = PrefixTree._forget_gone  # pyright: ignore[reportPrivateUsage]
    monkeypatch.setattr(PrefixTree, "_forget_gone", lambda tree: (counted.append(1), forget(tree)))
    for page in range(1000, 11_000):
        f.put([page, 0], [page])
        f.tree.drop(0)
    assert len(f.tree._leaves) < 2200  # pyright: ignore[reportPrivateUsage]
    assert 5 < len(counted) < 20


def test_random_evictions_take_what_was_unused_for_longest() -> None:
    """With paths that are locked for a while; `oldest_idle` against a search of the whole tree."""
    rng = random.Random(4)
    f = Fixture()
    locked: list[list[Node]] = []
    num_evicted = 0
    for page in itertools.count(0, 8):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 9))]
        match rng.randrange(6):
            case 0 | 1:
                f.put(tokens, list(range(page, page + -(-len(tokens) // SIZE))))
            case 2 | 3:
                nodes = f.tree.match(0, packed(*tokens), len(tokens)).nodes
                f.tree.lock(nodes)
                locked.append(nodes)
            case 4 if locked:
                f.tree.unlock(locked.pop(rng.randrange(len(locked))))
            case _ if leaf := f.tree.oldest_idle():
                f.tree.evict(leaf)
                num_evicted += 1
            case _:
                pass
        idle = [node for node in f.tree.nodes() if not node.refs and not node.children]
        oldest = f.tree.oldest_idle()
        assert (oldest is None) == (not idle)
        assert oldest is None or oldest.last_use == min(node.last_use for node in idle)
        if num_evicted == 500:
            return


def test_random_walk_against_a_list_of_prefixes() -> None:
    rng = random.Random(3)
    f = Fixture()
    stored: dict[int, list[int]] = {}  # page -> the tokens that end in it
    next_page = 0
    for _ in range(3000):
        tokens = [rng.randrange(3) for _ in range(rng.randrange(1, 8))]
        if rng.random() < 0.5:
            pages = list(range(next_page, next_page + -(-len(tokens) // SIZE)))
            next_page += len(pages)
            nodes = f.put(tokens, pages)
            for index, (node, page) in enumerate(zip(nodes, pages, strict=True)):
                if node.page == page:
                    stored[page] = tokens[: (index + 1) * SIZE]
        elif rng.random() < 0.3 and (leaf := f.tree.oldest_idle()):
            f.tree.evict(leaf)
        for page in f.freed:
            del stored[page]
        f.freed.clear()
        assert f.tree.num_pages == f.tree.num_idle == len(stored)
        pages, tail, tail_len = f.hit(*tokens)
        best = max((common(tokens, prefix) for prefix in stored.values()), default=0)
        assert len(pages) * SIZE + tail_len == best
        assert all(stored[page] == tokens[: (i + 1) * SIZE] for i, page in enumerate(pages))
        assert tail < 0 or common(stored[tail], tokens) == best


def common(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
