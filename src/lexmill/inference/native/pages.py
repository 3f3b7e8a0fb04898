"""Who holds which page of keys and values: counts, copies before writing, and a tree of prefixes that texts share.

Only numbers are moved here; what the pages hold lies in the engine. Not thread-safe: its owner locks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

from lexmill.inference.native.interface import BLOCK


class OutOfPages(Exception):
    """Nothing is free, and nothing can be given up. The scheduler acts on it; no user sees it."""

    def __init__(self, copies: Sequence[tuple[int, int]] = ()) -> None:
        super().__init__("no page is free")
        self.copies = list(copies)


def pages_of(tokens: int) -> int:
    """How many pages so many tokens take."""
    return -(-tokens // BLOCK)


class PageStore:
    """All pages of an engine: each is free, or held by tables, by the tree of prefixes, or by both.

    Args:
        count: pages of the engine.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.holders = [0] * count
        self._free = list(range(count - 1, -1, -1))
        self.prefixes = PrefixTree(self)

    @property
    def available(self) -> int:
        """Pages that `take` can give: free ones, and those that only the tree holds."""
        return len(self._free) + self.prefixes.idle

    def take(self) -> int:
        """A page of one's own.

        Raises:
            OutOfPages: all are held by texts.
        """
        if not self._free and not self.prefixes.give_up():
            raise OutOfPages
        page = self._free.pop()
        self.holders[page] = 1
        return page

    def hold(self, page: int) -> None:
        """One more holder of a page."""
        assert self.holders[page] > 0
        self.holders[page] += 1
        self.prefixes.held(page)

    def release(self, page: int) -> None:
        """One holder less; without any the page is free."""
        assert self.holders[page] > 0
        self.holders[page] -= 1
        if not self.holders[page]:
            self._free.append(page)
        else:
            self.prefixes.released(page)


class Table:
    """The pages of one text, in order."""

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self.pages: list[int] = []

    def reserve(self, start: int, end: int) -> list[tuple[int, int]]:
        """Make sure that positions `start` to `end` can be written without another text noticing.

        Returns:
            Pages to copy first: (from, to) each.

        Raises:
            OutOfPages: what was taken stays in the table, and the same call may be made again; `copies` are
                those that are due all the same.
        """
        copies: list[tuple[int, int]] = []
        for index in range(start // BLOCK, pages_of(end)):
            try:
                if index == len(self.pages):
                    self.pages.append(self._store.take())
                elif self._store.holders[self.pages[index]] > 1:
                    new = self._store.take()
                    copies.append((self.pages[index], new))
                    self._store.release(self.pages[index])
                    self.pages[index] = new
            except OutOfPages:
                raise OutOfPages(copies) from None
        return copies

    def missing(self, start: int, end: int) -> int:
        """How many pages `reserve` would take."""
        own = (self._store.holders[page] > 1 for page in self.pages[start // BLOCK : pages_of(end)])
        return max(pages_of(end) - len(self.pages), 0) + sum(own)

    def fork(self) -> Table:
        """Another text with the same beginning."""
        other = Table(self._store)
        other.pages = list(self.pages)
        for page in self.pages:
            self._store.hold(page)
        return other

    def begin_with(self, ids: Sequence[int]) -> int:
        """Take the longest beginning of a prompt that the tree has, if it is longer than what is here.

        All pages here hold tokens of the same prompt, computed to the last. The prompt's last token is never
        taken: it has to be computed for what follows it.

        Returns:
            How many tokens are here now; 0 if the tree has nothing longer.
        """
        found = self._store.prefixes.find(ids)
        longer = len(found) > len(self.pages)
        for page in self.pages if longer else found:
            self._store.release(page)
        if not longer:
            return 0
        self.pages = found
        return BLOCK * len(found)

    def share(self, ids: Sequence[int], computed: int) -> None:
        """Let the tree keep the whole pages of a prompt's first `computed` tokens.

        Where it has one of the same tokens behind the same beginning, this table takes it for its own: the
        bits in it are the same.
        """
        whole = computed // BLOCK
        self.pages[:whole] = self._store.prefixes.add(ids, self.pages[:whole])

    def free(self) -> None:
        """Hold nothing any more."""
        for page in reversed(self.pages):
            self._store.release(page)
        self.pages = []


class _Node:
    """A page of a prefix: BLOCK tokens behind those of its parents."""

    __slots__ = ("children", "key", "page", "parent", "used")

    def __init__(self, parent: _Node | None, key: tuple[int, ...], page: int) -> None:
        self.parent, self.key, self.page = parent, key, page
        self.children: dict[tuple[int, ...], _Node] = {}
        self.used = 0


class PrefixTree:
    """A radix tree of prompts that were computed, a page a node; the least recently used leaf is given up first.

    Prefixes as in SGLang's RadixAttention (Zheng et al. 2024).
    """

    def __init__(self, store: PageStore) -> None:
        self._store = store
        self._root = _Node(None, (), -1)
        self._nodes: dict[int, _Node] = {}  # by page
        self._leaves: list[tuple[int, int, _Node]] = []  # a heap; entries that no longer hold are passed over
        self._clock = self._serial = 0
        self.idle = 0  # pages that nobody but the tree holds

    def __len__(self) -> int:
        return len(self._nodes)

    def find(self, ids: Sequence[int]) -> list[int]:
        """The pages of the longest known beginning, now held by the caller too."""
        node, pages = self._root, []
        self._clock += 1
        for start in range(0, len(ids) - BLOCK, BLOCK):
            following = node.children.get(tuple(ids[start : start + BLOCK]))
            if following is None:
                break
            node = following
            node.used = self._clock
            self._store.hold(node.page)
            pages.append(node.page)
        return pages

    def add(self, ids: Sequence[int], pages: Sequence[int]) -> list[int]:
        """Keep whole pages of a prompt; what the caller holds now, for where one of the same tokens was known."""
        node, kept = self._root, []
        self._clock += 1
        for index, page in enumerate(pages):
            key = tuple(ids[index * BLOCK : (index + 1) * BLOCK])
            following = node.children.get(key)
            if following is None:
                assert page not in self._nodes, "who holds a page of the tree holds those before it"
                following = node.children[key] = self._nodes[page] = _Node(node, key, page)
                self._store.holders[page] += 1
            elif following.page != page:
                self._store.hold(following.page)
                self._store.release(page)
            node = following
            node.used = self._clock
            kept.append(node.page)
        return kept

    def held(self, page: int) -> None:
        """The store's word that a page has one holder more."""
        if page in self._nodes and self._store.holders[page] == 2:
            self.idle -= 1

    def released(self, page: int) -> None:
        """The store's word that a page has one holder less, but still has some."""
        if page in self._nodes and self._store.holders[page] == 1:
            self.idle += 1
            self._note(self._nodes[page])

    def give_up(self) -> bool:
        """Free the page of the least recently used leaf that only the tree holds; False if there is none."""
        while self._leaves:
            used, _, node = heapq.heappop(self._leaves)
            if used != node.used or not self._may_go(node):
                continue  # it was used since, or has children or a text again; then it is noted anew
            assert node.parent is not None
            del node.parent.children[node.key], self._nodes[node.page]
            self.idle -= 1
            self._store.release(node.page)
            self._note(node.parent)
            return True
        return False

    def clear(self) -> None:
        """Give up all that no text holds."""
        while self.give_up():
            pass

    def _may_go(self, node: _Node) -> bool:
        known = self._nodes.get(node.page) is node
        return known and not node.children and self._store.holders[node.page] == 1

    def _note(self, node: _Node) -> None:
        """Put a node among those that may be given up, if it is one."""
        if not self._may_go(node):
            return
        if len(self._leaves) > 2 * len(self._nodes) + 64:
            self._leaves = [one for one in self._leaves if one[0] == one[2].used and self._may_go(one[2])]
            heapq.heapify(self._leaves)
        self._serial += 1
        heapq.heappush(self._leaves, (node.used, self._serial, node))
