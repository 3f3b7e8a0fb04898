"""Pages of keys and values: whatever texts do, each reads exactly its own tokens, and no page is lost."""

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from lexmill.inference.native.interface import BLOCK
from lexmill.inference.native.pages import OutOfPages, PageStore, Table, pages_of

PAGES = 12


class Texts(RuleBasedStateMachine):
    """Texts come, grow, fork, share their prompts and go; a small memory stands for the engine's."""

    tables = Bundle("tables")

    def __init__(self):
        super().__init__()
        self.store = PageStore(PAGES)
        self.memory = np.full((PAGES, BLOCK), -1)
        self.texts = {}  # table -> (ids, how many of them were given)

    def write(self, table, ids, start):
        try:
            copies, fine = table.reserve(start, len(ids)), True
        except OutOfPages as error:
            copies, fine = error.copies, False
        for source, target in copies:
            self.memory[target] = self.memory[source]
        if not fine:
            return False
        for place in range(start, len(ids)):
            self.memory[table.pages[place // BLOCK], place % BLOCK] = ids[place]
        return True

    def end(self, table):
        del self.texts[table]
        table.free()

    @rule(target=tables, blocks=st.lists(st.integers(0, 2), max_size=4), rest=st.integers(1, BLOCK))
    def begin(self, blocks, rest):
        ids = [token for block in blocks for token in range(block * 100, block * 100 + BLOCK)] + [7] * rest
        table = Table(self.store)
        known = table.begin_with(ids)
        assert known < len(ids) and known % BLOCK == 0
        self.texts[table] = (ids, len(ids))
        if self.write(table, ids, known):
            table.share(ids, len(ids))
        else:
            self.end(table)
        return table

    @rule(table=tables, count=st.integers(1, 40), token=st.integers(0, 5))
    def grow(self, table, count, token):
        if table not in self.texts:
            return
        ids, given = self.texts[table]
        grown = ids + [token] * count
        if self.write(table, grown, len(ids)):
            self.texts[table] = (grown, given)
        else:
            self.end(table)

    @rule(target=tables, table=tables)
    def fork(self, table):
        other = table.fork()
        if table in self.texts:
            self.texts[other] = self.texts[table]
        return other

    @rule(table=consumes(tables))
    def leave(self, table):
        if table in self.texts:
            self.end(table)

    @rule()
    def forget(self):
        self.store.prefixes.clear()

    @invariant()
    def each_reads_its_own(self):
        for table, (ids, _) in self.texts.items():
            held = self.memory[table.pages[: pages_of(len(ids))]].ravel()[: len(ids)]
            assert held.tolist() == ids

    @invariant()
    def all_are_counted(self):
        counts = np.zeros(PAGES, int)
        for table in self.texts:
            np.add.at(counts, table.pages, 1)
        tree, idle = self.store.prefixes, 0
        for page, node in tree._nodes.items():
            idle += counts[page] == 0
            counts[page] += 1
            assert node.parent.children[node.key] is node
        assert counts.tolist() == self.store.holders
        assert idle == tree.idle
        assert self.store.available == int((counts == 0).sum()) + idle
        assert sorted(self.store._free) == np.flatnonzero(counts == 0).tolist()


TestTexts = Texts.TestCase
TestTexts.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_the_least_recently_used_prompt_goes_first():
    store = PageStore(3)
    prompts = [[number] * BLOCK + [9] for number in range(3)]
    for ids in prompts[:2]:
        table = Table(store)
        table.reserve(0, BLOCK)
        table.share(ids, BLOCK)
        table.free()
    again = Table(store)
    assert again.begin_with(prompts[0]) == BLOCK  # the older one is used once more
    again.free()
    assert store.available == 3
    new = Table(store)
    new.reserve(0, 2 * BLOCK)
    assert Table(store).begin_with(prompts[1]) == 0
    assert Table(store).begin_with(prompts[0]) == BLOCK


def test_a_prompt_is_never_known_to_its_last_token():
    store = PageStore(4)
    table, ids = Table(store), list(range(2 * BLOCK))
    table.reserve(0, len(ids))
    table.share(ids, len(ids))
    assert Table(store).begin_with(ids) == BLOCK
    assert Table(store).begin_with([*ids, 1]) == 2 * BLOCK


def test_what_all_texts_hold_cannot_be_taken():
    store = PageStore(2)
    table = Table(store)
    table.reserve(0, 2 * BLOCK)
    table.share(list(range(2 * BLOCK)), 2 * BLOCK)
    with pytest.raises(OutOfPages):
        Table(store).reserve(0, 1)
    table.free()
    Table(store).reserve(0, 1)


def test_two_texts_that_computed_the_same_prompt_hold_it_once():
    store = PageStore(4)
    ids, tables = list(range(2 * BLOCK)), [Table(store), Table(store)]
    for table in tables:
        table.reserve(0, len(ids))
    for table in tables:
        table.share(ids, len(ids))
    assert tables[0].pages == tables[1].pages
    assert store.available == 2
