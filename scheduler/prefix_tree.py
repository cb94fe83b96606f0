"""Which token prefixes have their KV in which pages: one tree per namespace (an adapter version, or a private group).

A node is one page: its key is the page's tokens (packed int32), its path from the root the whole prefix. Nodes above a
node are always full pages; a leaf may be partly filled. No key is a prefix of a sibling's, so the keys, kept sorted,
have the longest common prefix with a prompt right beside the place where the prompt would stand.

Who owns a page:

    running sequence   pages  [ 3 | 8 | 5 | 2 | 9 ]      first len(nodes) pages: the tree's, locked
                       nodes  [ 3 | 8 ]                  the others: the sequence's own
    tree               root ─ 3 ─┬─ 8 ─ 4                3, 8 locked (refs > 0): held
                                 └─ 7                    4, 7 idle: cached, evictable leaf by leaf

Locking counts every node of a path, so below an idle node all is idle. A sequence that computed the same page as
another takes the tree's and frees its own.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from manylora.scheduler.id_pool import StepClock

TOKEN_BYTES = 4


class Node:
    __slots__ = ("children", "key", "keys", "last_use", "listed", "page", "parent", "refs")

    def __init__(self, parent: Node | None, key: bytes, page: int, last_use: int) -> None:
        self.parent = parent
        self.key = key
        self.page = page  # -1: a root, or no longer in the tree
        self.refs = 0  # sequences that read this page
        self.last_use = last_use
        self.listed = False  # among the candidates for eviction
        self.children: dict[bytes, Node] = {}
        self.keys: list[bytes] = []  # of the children, sorted


class Match(NamedTuple):
    """A found prefix: whole pages, and the first `tail_len` tokens of one more page, to be copied."""

    nodes: list[Node]
    tail_page: int = -1
    tail_len: int = 0
    tail: Node | None = None  # the tree's node of tail_page, if it is the tree's


class PrefixTree:
    def __init__(self, page_size: int, clock: StepClock, free_pages: Callable[[list[int]], None]) -> None:
        self.num_pages = 0
        self.num_idle = 0  # pages with refs == 0
        self._page_bytes = page_size * TOKEN_BYTES
        self._clock = clock
        self._free_pages = free_pages
        self._roots: dict[int, Node] = {}
        # Candidates for eviction, each once: a heap of (last_use, tie-break, leaf) as they were when they came. What was used
        # or has gone since is put right when it comes to the top.
        self._leaves: list[tuple[int, int, Node]] = []
        self._pushed = 0
        self._max_leaves = 64

    def match(self, namespace: int, tokens: bytes, limit: int) -> Match:
        """The longest cached prefix of packed `tokens`, at most `limit` tokens."""
        node = self._roots.get(namespace)
        nodes: list[Node] = []
        if node is None:
            return Match(nodes)
        size, end, start = self._page_bytes, limit * TOKEN_BYTES, 0
        while start + size <= end and (child := node.children.get(tokens[start : start + size])):
            nodes.append(child)
            node = child
            start += size
        rest = tokens[start : min(start + size, end)]
        tail, length = _longest_common(node, rest)
        return Match(nodes, tail.page, length, tail) if tail else Match(nodes)

    def lock(self, nodes: Iterable[Node]) -> None:
        for node in nodes:
            self.num_idle -= node.refs == 0
            node.refs += 1

    def unlock(self, nodes: list[Node]) -> None:
        now = self._clock.use()
        for node in nodes:
            node.last_use = now
            node.refs -= 1
            assert node.refs >= 0
            self.num_idle += node.refs == 0
        if nodes:
            self._offer(nodes[-1])

    def insert(
        self, namespace: int, parent: Node | None, key: bytes, page: int, *, lock: bool = False
    ) -> Node:
        """Give `page` to the tree as `key` below `parent` (None: the root), and lock its node if asked to.

        Returns the node that holds the key's tokens: if its page is another one, the tree had them and the page stays
        the caller's.
        """
        if parent is None:
            parent = self._roots.setdefault(namespace, Node(None, b"", -1, 0))
        node = self._find(parent, key)
        if node is None:
            node = Node(parent, key, page, self._clock.use())
            parent.children[key] = node
            insort(parent.keys, key)
            self.num_pages += 1
            self.num_idle += 1
        if lock:
            self.lock((node,))
        else:
            self._offer(node)
        return node

    def _find(self, parent: Node, key: bytes) -> Node | None:
        """The child that holds the key's tokens, and maybe more. A shorter one that the key is to supersede goes."""
        if found := parent.children.get(key):
            return found
        index = bisect_left(parent.keys, key)
        if index < len(parent.keys) and parent.keys[index].startswith(key):
            return parent.children[parent.keys[index]]
        if index and key.startswith(parent.keys[index - 1]):
            self._remove(parent.children[parent.keys[index - 1]])
        return None

    def oldest_idle(self) -> Node | None:
        """The idle leaf unused for longest."""
        while self._leaves:
            last_use, _, node = self._leaves[0]
            if _is_idle_leaf(node) and node.last_use == last_use:
                return node
            heapq.heappop(self._leaves)
            node.listed = False
            self._offer(node)
        return None

    def evict(self, node: Node) -> None:
        """Forget an idle leaf and free its page."""
        self._remove(node)
        assert node.parent is not None
        self._offer(node.parent)

    def forget(self, nodes: list[Node]) -> None:
        """Forget as much of a path as nobody else uses: its KV is not to be trusted."""
        for node in reversed(nodes):
            if not _is_idle_leaf(node):
                return
            self.evict(node)

    def drop(self, namespace: int) -> None:
        """Forget a whole namespace; nobody may be using it."""
        root = self._roots.pop(namespace, None)
        if root is None:
            return
        nodes = list(_subtree(root))
        self._discard(nodes)
        for node in (root, *nodes):
            node.children.clear()  # else nodes would refer to each other, and wait for the garbage collector

    def clear(self) -> None:
        for namespace in list(self._roots):
            self.drop(namespace)

    def namespaces(self) -> list[int]:
        return list(self._roots)

    def nodes(self) -> Iterator[Node]:
        """Every node, for the ledger's recount."""
        for root in self._roots.values():
            yield from _subtree(root)

    def _offer(self, node: Node) -> None:
        """Make `node` a candidate for eviction if it is an idle leaf."""
        if node.listed or not _is_idle_leaf(node):
            return
        if len(self._leaves) >= self._max_leaves:
            self._forget_gone()
        self._pushed += 1
        heapq.heappush(self._leaves, (node.last_use, self._pushed, node))
        node.listed = True

    def _forget_gone(self) -> None:
        """Keep the candidates that are some. As many may come before the next time, so that each costs little."""
        kept = [entry for entry in self._leaves if _is_idle_leaf(entry[2])]
        for _, _, node in self._leaves:
            node.listed = False
        for _, _, node in kept:
            node.listed = True
        heapq.heapify(kept)
        self._leaves = kept
        self._max_leaves = 64 + 2 * len(kept)

    def _remove(self, node: Node) -> None:
        assert _is_idle_leaf(node)
        parent = node.parent
        assert parent is not None
        del parent.children[node.key]
        del parent.keys[bisect_left(parent.keys, node.key)]
        self._discard([node])

    def _discard(self, nodes: list[Node]) -> None:
        assert not any(node.refs for node in nodes)
        self.num_pages -= len(nodes)
        self.num_idle -= len(nodes)
        self._free_pages([node.page for node in nodes])
        for node in nodes:
            node.page = -1


def _is_idle_leaf(node: Node) -> bool:
    return node.refs == 0 and not node.children and node.page >= 0


def _longest_common(node: Node, tokens: bytes) -> tuple[Node | None, int]:
    """The child of `node` that shares most leading tokens with `tokens`, and how many."""
    index = bisect_left(node.keys, tokens)
    best: tuple[Node | None, int] = (None, 0)
    for key in node.keys[max(0, index - 1) : index + 1]:
        common = _num_common(key, tokens)
        if common > best[1]:
            best = (node.children[key], common)
    return best


def _num_common(a: bytes, b: bytes) -> int:
    count = 0
    for start in range(0, min(len(a), len(b)), TOKEN_BYTES):
        if a[start : start + TOKEN_BYTES] != b[start : start + TOKEN_BYTES]:
            break
        count += 1
    return count


def _subtree(root: Node) -> Iterator[Node]:
    stack = list(root.children.values())
    while stack:
        node = stack.pop()
        yield node
        stack.extend(node.children.values())
