"""The block manager loses nothing, gives nothing twice, and what it finds is what was asked for."""

import random
from collections.abc import Hashable

import pytest

from qtool.runtime.engine.blocks import BlockManager, Copy, Match


def fill(blocks: BlockManager, name: str, token_ids: list[int], scope: Hashable = None) -> int:
    """Admit a sequence and compute all of it; says how much was found in the cache."""
    cached = blocks.admit(name, token_ids, scope)
    assert cached is not None
    blocks.computed(name, len(token_ids))
    return cached


def test_a_table_grows_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    a, b = [1], [2, 2, 2, 2]
    assert blocks.admit("a", a) == 0
    assert list(blocks.table("a")) == [0]
    assert blocks.allocate("a", 4)
    assert list(blocks.table("a")) == [0]
    assert blocks.admit("b", b) == 0
    assert blocks.allocate("a", 9)
    assert list(blocks.table("a")) == [0, 2, 3]
    assert blocks.num_free_blocks == 4
    assert blocks.usage == 0.5


def test_allocation_is_all_or_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    assert blocks.admit("a", [1] * 8) == 0
    assert blocks.admit("b", [2] * 5) is None
    assert list(blocks.table("b")) == []
    assert not blocks.allocate("a", 13)
    assert len(blocks.table("a")) == 2
    assert blocks.admit("b", [2] * 4, spare_blocks=1) is None
    assert blocks.admit("b", [2] * 4) == 0
    with pytest.raises(ValueError, match="already has blocks"):
        blocks.admit("b", [2] * 4)
    blocks.check()


def test_freed_blocks_without_content_come_in_rising_order_again() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4, caching=False)
    assert blocks.admit("a", [1] * 12) == 0
    blocks.computed("a", 12)
    blocks.free("a")
    assert blocks.num_free_blocks == 3
    assert list(blocks.table("a")) == []
    blocks.free("a")  # a sequence that holds nothing
    assert blocks.admit("b", [1] * 12) == 0  # nothing is remembered
    assert list(blocks.table("b")) == [0, 1, 2]  # one slice of the pool
    blocks.check()


def test_a_prompt_finds_the_blocks_it_begins_with() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    assert fill(blocks, "a", [1, 2, 3, 4, 5]) == 0
    assert blocks.look_up("b", [1, 2, 3, 4, 6, 7]) == Match(4)
    assert fill(blocks, "b", [1, 2, 3, 4, 6, 7]) == 4
    assert list(blocks.table("b"))[:2] == list(blocks.table("a"))[:2]
    blocks.free("a")
    blocks.free("b")
    blocks.check()
    assert blocks.usage == 0.0
    assert fill(blocks, "c", [1, 2, 3, 4, 6, 7, 8]) == 6  # also from sequences that have ended
    assert fill(blocks, "d", [2, 1, 3, 4, 6, 7, 8]) == 0
    blocks.check()


def test_the_last_token_is_always_computed() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    assert fill(blocks, "a", [1, 2, 3, 4]) == 0
    assert blocks.admit("b", [1, 2, 3, 4]) == 3  # a block shared, and a token of the next copied
    assert blocks.take_copies() == [Copy(blocks.table("a")[1], blocks.table("b")[1], 1)]
    assert fill(blocks, "one", [1]) == 0


def test_the_beginning_of_a_block_that_differs_later_is_copied() -> None:
    blocks = BlockManager(num_blocks=9, block_size=4)
    assert fill(blocks, "a", [1, 2, 3, 4, 5, 6, 7, 8]) == 0
    assert fill(blocks, "b", [1, 2, 3, 4, 5, 9, 9, 9]) == 5
    assert blocks.take_copies() == [Copy(blocks.table("a")[1], blocks.table("b")[1], 1)]
    assert fill(blocks, "c", [1, 2, 3, 4, 5, 6, 7, 1, 1]) == 7  # the longer of two beginnings
    assert blocks.take_copies() == [Copy(blocks.table("a")[1], blocks.table("c")[1], 3)]
    blocks.check()


def test_the_unfilled_last_block_of_an_ended_sequence_is_copied_from() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    prompt = [1, 2, 3, 4, 5, 6]
    assert fill(blocks, "a", prompt) == 0
    last = blocks.table("a")[1]
    blocks.free("a")
    blocks.check()
    assert fill(blocks, "b", [*prompt, 7, 8]) == 6
    assert blocks.take_copies() == [Copy(last, blocks.table("b")[1], 2)]
    blocks.check()


def test_salts_and_adapters_share_nothing() -> None:
    blocks = BlockManager(num_blocks=16, block_size=2)
    prompt = [1, 2, 3, 4, 5]
    assert fill(blocks, "plain", prompt) == 0
    assert fill(blocks, "mine", prompt, ("adapter", "salt")) == 0
    assert fill(blocks, "mine again", prompt, ("adapter", "salt")) == 4
    assert fill(blocks, "yours", prompt, ("adapter", "other salt")) == 0
    for name in ("plain", "mine", "mine again", "yours"):
        blocks.free(name)
    blocks.check()
    assert blocks.num_free_blocks == 16


def test_a_prompt_being_computed_is_worth_waiting_for() -> None:
    blocks = BlockManager(num_blocks=16, block_size=2)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    assert blocks.admit("first", list(prompt)) == 0
    match = blocks.look_up("second", list(prompt))
    assert match.num_tokens == 0
    assert match.pending is not None
    blocks.computed("first", 4)
    assert match.pending.is_pending  # the third block is still to come
    assert blocks.look_up("third", [1, 2, 3, 4, 9, 9]) == Match(4)
    blocks.computed("first", 7)
    assert not match.pending.is_pending
    assert fill(blocks, "second", list(prompt)) == 6
    blocks.check()


def test_a_promise_ends_with_who_made_it() -> None:
    blocks = BlockManager(num_blocks=16, block_size=2)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    assert blocks.admit("first", list(prompt)) == 0
    match = blocks.look_up("second", list(prompt))
    blocks.computed("first", 3)
    blocks.free("first")
    blocks.check()
    assert match.pending is not None
    assert not match.pending.is_pending
    assert blocks.look_up("second", list(prompt)).num_tokens == 3  # a block, and half of the next


def test_content_unused_longest_is_given_up_first_and_ends_before_beginnings() -> None:
    blocks = BlockManager(num_blocks=6, block_size=2)
    fill(blocks, "old", [1, 1, 1, 1])
    fill(blocks, "new", [2, 2, 2, 2])
    blocks.free("old")
    blocks.free("new")
    assert blocks.num_cached_blocks == 4
    assert blocks.admit("large", [3] * 6) == 0  # two blank blocks, and the end of "old"
    assert blocks.look_up("old again", [1, 1, 1, 1, 1]) == Match(2)
    assert blocks.look_up("new again", [2, 2, 2, 2, 2]) == Match(4)
    blocks.check()
    blocks.clear_cache()
    assert blocks.look_up("new again", [2, 2, 2, 2, 2]) == Match(0)
    blocks.check()


def test_blocks_found_in_the_cache_are_not_counted_twice_as_free() -> None:
    blocks = BlockManager(num_blocks=3, block_size=2)
    fill(blocks, "a", [1, 2, 3, 4])
    blocks.free("a")
    # Of three free blocks two would be reused, so one is left for the two that are new.
    assert blocks.admit("b", [1, 2, 3, 4, 5, 6, 7, 8]) is None
    assert blocks.admit("b", [1, 2, 3, 4, 5, 6]) == 4
    blocks.check()


def test_what_two_have_computed_is_kept_once() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    a, b = [1], [1]
    assert blocks.admit("a", a) == blocks.admit("b", b) == 0
    for name, token_ids in (("a", a), ("b", b)):
        token_ids.append(2)
        assert blocks.allocate(name, 2)
        blocks.computed(name, 2)
        blocks.check()
    assert list(blocks.table("a")) == list(blocks.table("b"))
    assert blocks.num_free_blocks == 7


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    prompt = [1, 2, 3, 4, 5]
    fill(blocks, "a", prompt)
    assert blocks.fork("a", "b", [*prompt, 6], 5)
    assert blocks.table("b")[:2] == blocks.table("a")[:2]
    assert blocks.take_copies() == [Copy(blocks.table("a")[2], blocks.table("b")[2], 1)]
    assert blocks.take_copies() == []
    assert blocks.fork(
        "a", "c", [*prompt], 4
    )  # nothing to copy: that the pool is full is no matter
    assert not blocks.fork("a", "d", [*prompt, 7], 5)
    assert list(blocks.table("d")) == []
    with pytest.raises(ValueError, match="already has a table"):
        blocks.fork("a", "c", [*prompt], 4)
    blocks.check()
    for sequence in "abc":
        blocks.free(sequence)
    blocks.check()
    assert blocks.num_free_blocks == 4


def test_content_of_a_failed_sequence_is_found_by_nobody_and_cleared() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2)
    fill(blocks, "bad", [1, 2, 3, 4, 5])
    fill(blocks, "heir", [1, 2, 3, 9])
    shared = blocks.table("bad")[0]
    private = set(blocks.table("bad")) - {shared}
    blocks.discard("bad")
    blocks.check()
    assert set(blocks.take_dirty()) == private
    assert blocks.look_up("next", [1, 2, 3, 4, 5]) == Match(0)
    blocks.free("heir")
    blocks.check()
    assert shared in blocks.take_dirty()
    assert blocks.take_dirty() == []


def test_blocks_behind_the_window_are_given_up_and_still_found() -> None:
    blocks = BlockManager(num_blocks=8, block_size=2, window=3)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    fill(blocks, "a", prompt)
    held = list(blocks.table("a"))
    blocks.release("a")
    # Token 7 will see tokens 5, 6 and itself: the blocks of tokens 0 to 3 are free.
    assert list(blocks.table("a")) == [0, 0, *held[2:]]
    assert blocks.num_free_blocks == 6
    blocks.check()
    assert blocks.admit("b", list(range(50, 62))) == 0  # takes all that is free
    assert blocks.num_free_blocks == 0
    blocks.free("b")
    # The first two blocks are gone, but token 6 sees tokens 4 to 6 only.
    assert blocks.look_up("c", prompt) == Match(6)
    assert blocks.look_up("d", prompt[:5]) == Match(0)  # token 4 sees tokens 2 to 4
    blocks.check()


def test_a_window_needs_only_what_it_sees() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2, window=3)
    prompt = [1, 2, 3, 4, 5, 6, 7]
    fill(blocks, "a", prompt)
    blocks.release("a")
    assert blocks.admit("b", [50, 51]) == 0  # takes the block of tokens 2 and 3 or 0 and 1
    blocks.free("a")
    assert blocks.admit("c", prompt) == 6
    # Token 6 sees tokens 4 to 6: of the first two blocks nothing is held.
    assert len(blocks.table("c")) == 4
    blocks.check()


def test_a_prompt_may_take_the_very_blocks_it_was_found_by() -> None:
    blocks = BlockManager(num_blocks=2, block_size=1, window=1)
    fill(blocks, "a", [5, 6])
    blocks.free("a")
    assert blocks.admit("b", [5, 6, 7, 8]) == 2  # no token sees another: none of them is needed
    blocks.check()
    assert blocks.num_free_blocks == 0


def test_check_notices_a_block_that_is_lost_or_held_twice() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    assert blocks.admit("a", [1, 2, 3, 4]) == 0
    blocks.fork("a", "b", [1, 2, 3], 2)
    blocks._tables["b"].blocks.append(blocks.table("a")[1])
    with pytest.raises(AssertionError, match="in 2 tables, counted 1"):
        blocks.check()
    del blocks._tables["b"], blocks._tables["a"]
    with pytest.raises(AssertionError, match="in 0 tables, counted 2"):
        blocks.check()


class Pool:
    """A pool that stores in each slot what a key depends on: the tokens up to it, and the scope."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.size = rng.randint(1, 5)
        window = rng.choice((None, None, rng.randint(1, 3 * self.size)))
        self.window = window
        num_blocks = rng.randint(3, 20)
        self.blocks = BlockManager(num_blocks, self.size, caching=rng.random() < 0.9, window=window)
        self.slots: list[object] = [None] * (num_blocks * self.size)
        self.sequences: dict[str, tuple[list[int], Hashable]] = {}
        self.num_computed: dict[str, int] = {}
        self.num_found = 0

    def content(self, name: str, position: int) -> object:
        token_ids, scope = self.sequences[name]
        return scope, tuple(token_ids[: position + 1])

    def slot(self, name: str, position: int) -> int:
        return self.blocks.table(name)[position // self.size] * self.size + position % self.size

    def admit(self, name: str) -> None:
        rng = self.rng
        longest = 4 * self.size
        if self.sequences and rng.random() < 0.6:
            other, scope = rng.choice(list(self.sequences.values()))
            token_ids = other[: rng.randint(1, len(other))]
        else:
            token_ids, scope = [], rng.choice((None, "salt"))
        token_ids = [*token_ids, *(rng.randint(0, 2) for _ in range(rng.randint(1, longest)))]
        match = self.blocks.look_up(name, token_ids, scope)
        at_once = rng.choice((None, rng.randint(1, longest)))
        cached = self.blocks.admit(
            name, token_ids, scope, num_tokens=at_once, spare_blocks=rng.randint(0, 2)
        )
        if cached is None:
            assert list(self.blocks.table(name)) == []
            self.blocks.free(name)
            return
        assert cached == match.num_tokens < len(token_ids)
        self.num_found += cached
        self.sequences[name] = token_ids, scope
        self.num_computed[name] = cached

    def step(self) -> None:
        """Some sequences compute a chunk each, and grow: make room, edit, write and read."""
        chunks: dict[str, tuple[int, int]] = {}
        for name in list(self.sequences):
            if self.rng.random() < 0.3:
                continue
            token_ids, _ = self.sequences[name]
            start = self.num_computed[name]
            stop = self.rng.randint(start + 1, max(len(token_ids), start + 1))
            if stop > len(token_ids):
                token_ids.append(self.rng.randint(0, 1))
            if self.blocks.allocate(name, stop):
                chunks[name] = start, stop
            else:
                self.remove(name)
        for block in self.blocks.take_dirty():
            self.slots[block * self.size : (block + 1) * self.size] = [None] * self.size
        for source, target, count in self.blocks.take_copies():
            first, second = source * self.size, target * self.size
            self.slots[second : second + count] = self.slots[first : first + count]
        for name, (start, stop) in chunks.items():
            for position in range(start, stop):
                self.slots[self.slot(name, position)] = self.content(name, position)
            first_seen = 0 if self.window is None else max(start - self.window + 1, 0)
            for position in range(first_seen, stop):
                assert self.slots[self.slot(name, position)] == self.content(name, position)
        for name, (_, stop) in chunks.items():
            self.blocks.computed(name, stop)
            self.num_computed[name] = stop
            self.blocks.release(name)

    def fork(self, name: str) -> None:
        parent = self.rng.choice(list(self.sequences))
        computed = self.num_computed[parent]
        if not computed:
            return
        token_ids = [*self.sequences[parent][0][:computed], self.rng.randint(0, 2)]
        if self.blocks.fork(parent, name, token_ids, computed):
            self.sequences[name] = token_ids, self.sequences[parent][1]
            self.num_computed[name] = computed

    def remove(self, name: str) -> None:
        if self.rng.random() < 0.1 and not self.blocks._copies:
            self.blocks.discard(name)
        else:
            self.blocks.free(name)
        del self.sequences[name], self.num_computed[name]

    def act(self, name: str) -> None:
        kind = self.rng.random()
        if kind < 0.3:
            self.admit(name)
        elif kind < 0.8 or not self.sequences:
            self.step()
        elif kind < 0.87:
            self.fork(name)
        elif kind < 0.99:
            self.remove(self.rng.choice(list(self.sequences)))
        else:
            self.blocks.clear_cache()


@pytest.mark.parametrize("seed", range(8))
def test_any_operations_conserve_blocks_and_content(seed: int) -> None:
    rng = random.Random(seed)
    num_found = 0
    for _ in range(25):
        pool = Pool(rng)
        for turn in range(80):
            pool.act(f"s{turn}")
            pool.blocks.check()
        for name in list(pool.sequences):
            pool.blocks.free(name)
        pool.blocks.check()
        assert pool.blocks.num_free_blocks == pool.blocks.num_blocks
        num_found += pool.num_found
    assert num_found > 100  # the cache was used
