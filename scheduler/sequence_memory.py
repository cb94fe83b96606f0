"""A sequence's pages over its life: what it finds cached, what it takes, shares, and gives back.

A page becomes the tree's as soon as its tokens are known and a completed step has written them; the last, partly
filled page when the sequence leaves. A hit ends inside a page by copying that page.
"""

from __future__ import annotations

from manylora.scheduler.memory import Memory
from manylora.scheduler.prefix_tree import Match, Node
from manylora.scheduler.sequence import Sequence


class SequenceMemory:
    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._size = memory.page_size
        self._tree = memory.tree
        self._moved: list[tuple[Sequence, int, int]] = []  # (sequence, its generation, index of the page)

    def enter(self, sequence: Sequence, spare: int) -> tuple[bool, Match]:
        """Take pages for all tokens known, as many of them cached as possible.

        False if memory is short; `spare` pages are left for others. The match's tail page is to be copied to the page
        after the matched ones before this step ends; its node stays locked until `unlock_tail`.
        """
        match = self._match(sequence)
        total = self._memory.pages_for(len(sequence.tokens))
        self._tree.lock(match.nodes)
        if match.tail:
            self._tree.lock((match.tail,))
        pages = self._memory.take_kv(total - len(match.nodes), spare)
        if pages is None and match.tail:  # the tail itself may be the page that is missing
            self._tree.unlock([match.tail])
            match = Match(match.nodes)
            pages = self._memory.take_kv(total - len(match.nodes), spare)
        if pages is None:
            self._tree.unlock(match.nodes)
            return False, match
        sequence.nodes = match.nodes
        sequence.pages = [node.page for node in match.nodes] + pages
        sequence.capacity = total * self._size
        hit = len(match.nodes) * self._size + match.tail_len
        sequence.prefill_end = len(sequence.tokens)
        sequence.num_planned = hit
        sequence.num_written = 0
        if sequence.cached_tokens < 0:
            sequence.cached_tokens = hit
        return True, match

    def unlock_tail(self, tail: Node) -> None:
        self._tree.unlock([tail])

    def grow(self, sequence: Sequence) -> int | None:
        """One more page at the end, or None."""
        taken = self._memory.take_kv(1)
        if taken is None:
            return None
        sequence.pages += taken
        sequence.capacity += self._size
        return taken[0]

    def publish(self, sequence: Sequence, written: int) -> None:
        """Hand the full pages among the first `written` tokens to the tree."""
        if sequence.namespace is None:
            return
        size, nodes, pages = self._size, sequence.nodes, sequence.pages
        while (len(nodes) + 1) * size <= written:
            index = len(nodes)
            key = sequence.tokens[index * size : (index + 1) * size].tobytes()
            parent = nodes[-1] if nodes else None
            node = self._tree.insert(sequence.namespace, parent, key, pages[index], lock=True)
            if node.page != pages[index]:  # somebody computed the same tokens: share theirs
                self._memory.free_kv([pages[index]])
                pages[index] = node.page
                self._moved.append((sequence, sequence.generation, index))
            nodes.append(node)

    def leave(self, sequence: Sequence, *, trusted: bool = True) -> None:
        """Give every page back; what is written and `trusted` stays cached."""
        kept = 0
        if trusted and sequence.namespace is not None:
            self.publish(sequence, sequence.num_valid)
            kept = self._publish_tail(sequence)
        nodes = sequence.nodes
        self._tree.unlock(nodes)
        if not trusted:
            self._tree.forget(nodes)
        self._memory.free_kv(sequence.pages[len(nodes) + kept :])
        sequence.nodes, sequence.pages = [], []

    def drop_namespace(self, namespace: int) -> None:
        self._tree.drop(namespace)

    def take_moved(self) -> list[tuple[int, int, int]]:
        """(slot, index, page) of the pages exchanged since the last call, for the workers' page tables."""
        moved, self._moved = self._moved, []
        return [
            (sequence.slot, index, sequence.pages[index])
            for sequence, generation, index in moved
            if sequence.generation == generation
        ]

    def _publish_tail(self, sequence: Sequence) -> int:
        """Hand the partly filled page to the tree; how many pages it took (0 or 1)."""
        nodes, valid = sequence.nodes, sequence.num_valid
        start = len(nodes) * self._size
        if valid <= start or sequence.namespace is None:
            return 0
        page = sequence.pages[len(nodes)]
        key = sequence.tokens[start:valid].tobytes()
        node = self._tree.insert(sequence.namespace, nodes[-1] if nodes else None, key, page)
        return int(node.page == page)

    def _match(self, sequence: Sequence) -> Match:
        if sequence.namespace is None:
            return Match([])
        limit = sequence.reuse_limit
        match = self._tree.match(sequence.namespace, sequence.tokens.tobytes(), limit)
        source = sequence.group.prompt_source() if sequence.group else None
        if source is None:
            return match
        index = len(match.nodes)
        common = min(limit, sequence.prompt_len, (index + 1) * self._size) - index * self._size
        if common <= match.tail_len:
            return match
        return Match(match.nodes, source.pages[index], common)
