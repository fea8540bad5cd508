"""The block manager loses nothing and gives nothing twice, whatever is asked of it."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.runtime.engine.blocks import BlockManager, Copy


def test_a_table_grows_by_whole_blocks() -> None:
    blocks = BlockManager(num_blocks=8, block_size=4)
    assert blocks.allocate("a", 1)
    assert list(blocks.table("a")) == [0]
    assert blocks.allocate("a", 4)
    assert list(blocks.table("a")) == [0]
    assert blocks.allocate("b", 4)
    assert blocks.allocate("a", 9)
    assert list(blocks.table("a")) == [0, 2, 3]
    assert blocks.num_free_blocks == 4
    assert blocks.usage == 0.5


def test_allocation_is_all_or_nothing() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    assert blocks.allocate("a", 8)
    assert not blocks.allocate("b", 5)
    assert list(blocks.table("b")) == []
    assert not blocks.allocate("a", 13)
    assert len(blocks.table("a")) == 2
    assert blocks.allocate("b", 4)


def test_freed_blocks_return_to_the_pool() -> None:
    blocks = BlockManager(num_blocks=3, block_size=4)
    assert blocks.allocate("a", 12)
    blocks.free("a")
    assert blocks.num_free_blocks == 3
    assert list(blocks.table("a")) == []
    blocks.free("a")  # a sequence that holds nothing
    assert blocks.allocate("b", 12)
    assert list(blocks.table("b")) == [0, 1, 2]  # in rising order again: one slice of the pool
    blocks.check()


def test_a_shared_block_is_free_when_its_last_holder_is() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    assert blocks.allocate("a", 4)
    blocks.adopt("b", blocks.table("a")[:1])
    assert blocks.allocate("b", 4)
    assert blocks.table("b")[0] == blocks.table("a")[0]
    assert blocks.table("b")[1] != blocks.table("a")[1]
    blocks.free("a")
    blocks.check()
    assert blocks.num_free_blocks == 2
    blocks.free("b")
    assert blocks.num_free_blocks == 4


def test_a_fork_shares_full_blocks_and_copies_the_rest() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    assert blocks.allocate("a", 5)
    assert blocks.fork("a", "b", 5)
    assert blocks.table("b")[:2] == blocks.table("a")[:2]
    assert blocks.take_copies() == [Copy(blocks.table("a")[2], blocks.table("b")[2], 1)]
    assert blocks.take_copies() == []
    assert blocks.fork("a", "c", 4)  # nothing to copy: the pool is full, and that is no matter
    assert not blocks.fork("a", "d", 5)
    assert list(blocks.table("d")) == []
    blocks.check()
    for sequence in "abc":
        blocks.free(sequence)
    blocks.check()
    assert blocks.num_free_blocks == 4


def test_only_held_blocks_can_be_adopted_and_only_by_a_new_sequence() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    assert blocks.allocate("a", 2)
    with pytest.raises(ValueError, match="nobody holds"):
        blocks.adopt("b", [3])
    with pytest.raises(ValueError, match="already has a table"):
        blocks.adopt("a", blocks.table("a"))
    blocks.check()


def test_check_notices_a_block_that_is_lost_or_held_twice() -> None:
    blocks = BlockManager(num_blocks=4, block_size=2)
    assert blocks.allocate("a", 4)
    blocks._tables["b"] = [blocks.table("a")[0]]
    with pytest.raises(AssertionError, match="in 2 tables, counted 1"):
        blocks.check()
    del blocks._tables["b"], blocks._tables["a"]
    with pytest.raises(AssertionError, match="in 0 tables, counted 1"):
        blocks.check()


NAMES = st.sampled_from("abcde")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("allocate"), NAMES, st.integers(0, 40)),
        st.tuples(st.just("free"), NAMES, st.just(0)),
        st.tuples(st.just("adopt"), NAMES, NAMES),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=150)
@given(num_blocks=st.integers(1, 12), block_size=st.integers(1, 5), operations=OPERATIONS)
def test_any_operations_conserve_blocks(
    num_blocks: int, block_size: int, operations: list[tuple[str, str, int | str]]
) -> None:
    blocks = BlockManager(num_blocks, block_size)
    for name, sequence, argument in operations:
        before = {other: list(blocks.table(other)) for other in "abcde"}
        if name == "allocate":
            assert isinstance(argument, int)
            free = blocks.num_free_blocks
            missing = max(0, blocks.blocks_for(argument) - len(before[sequence]))
            assert blocks.allocate(sequence, argument) == (missing <= free)
            grown = list(blocks.table(sequence))
            assert grown[: len(before[sequence])] == before[sequence]
            assert len(grown) - len(before[sequence]) == (missing if missing <= free else 0)
        elif name == "free":
            blocks.free(sequence)
            assert list(blocks.table(sequence)) == []
        elif not before[sequence] and before[str(argument)]:
            blocks.free(sequence)
            blocks.adopt(sequence, before[str(argument)])
        blocks.check()
        for other in set("abcde") - {sequence}:
            assert list(blocks.table(other)) == before[other]
    for sequence in "abcde":
        blocks.free(sequence)
    blocks.check()
    assert blocks.num_free_blocks == num_blocks
