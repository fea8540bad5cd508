"""Who owns which block of the KV pool.

The pool is cut into blocks of `block_size` tokens. A sequence has a table: the blocks that hold its
tokens, in order, filled from the left and never reordered. Tables only grow until they are freed as
a whole, so a full block never changes: that is what lets several tables name the same block, each
with a reference of its own. Prefix reuse needs no more than that (a chain of hashes over full
blocks that finds one to `adopt`, and freed blocks that keep their content until taken), and
preemption is `free` followed by a new `allocate`.

    block_size 4, table [7, 2, 9], 10 tokens
    token  0 1 2 3 | 4 5 6 7 | 8 9 . .
    block     7    |    2    |    9          slot of token 5: 2 * 4 + 1 = 9

Conservation, checked by `check`: every block is either free, exactly once, or held by as many
tables as its reference count says; nothing is both and nothing is lost.
"""

from collections import Counter, deque
from collections.abc import Sequence
from typing import NamedTuple


class Copy(NamedTuple):
    """The first `num_tokens` tokens of a block are to be copied into another block."""

    source: int
    target: int
    num_tokens: int


class BlockManager:
    """The blocks of one pool. Pure bookkeeping: it never touches a tensor."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens make no pool")
        self.num_blocks = num_blocks
        self.block_size = block_size
        # Taken from the left and returned there, last block first: so blocks come in rising order,
        # the table of a sequence alone in the pool is one slice of it, and a little-used pool
        # touches little memory.
        self._free: deque[int] = deque(range(num_blocks))
        self._references = [0] * num_blocks
        self._tables: dict[str, list[int]] = {}
        self._copies: list[Copy] = []

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the pool that is held, 0 to 1."""
        return 1.0 - len(self._free) / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, sequence_id: str) -> Sequence[int]:
        """The blocks of a sequence, in the order of its tokens; empty if it holds none."""
        return self._tables.get(sequence_id, ())

    def allocate(self, sequence_id: str, num_tokens: int) -> bool:
        """Grow the sequence's table until it holds num_tokens. All or nothing: False if the free
        blocks do not suffice, and nothing has changed.
        """
        missing = self.blocks_for(num_tokens) - len(self.table(sequence_id))
        if missing > len(self._free):
            return False
        table = self._tables.setdefault(sequence_id, [])
        for _ in range(missing):
            block = self._free.popleft()
            self._references[block] = 1
            table.append(block)
        return True

    def adopt(self, sequence_id: str, block_ids: Sequence[int]) -> None:
        """Start the table of a new sequence with full blocks that others hold already."""
        if sequence_id in self._tables:
            raise ValueError(f"{sequence_id} already has a table")
        if not all(self._references[block] for block in block_ids):
            raise ValueError(f"{sequence_id} cannot adopt blocks that nobody holds: {block_ids}")
        for block in block_ids:
            self._references[block] += 1
        self._tables[sequence_id] = list(block_ids)

    def fork(self, parent_id: str, child_id: str, num_tokens: int) -> bool:
        """Give a new sequence the first num_tokens tokens of another's.

        Full blocks are shared; of one that both would go on writing to, the child gets a copy.
        False if no block is free for that, and nothing has changed.
        """
        full, rest = divmod(num_tokens, self.block_size)
        if rest and not self._free:
            return False
        parent = self._tables[parent_id]
        self.adopt(child_id, parent[:full])
        if rest:
            self.allocate(child_id, num_tokens)
            self._copies.append(Copy(parent[full], self._tables[child_id][full], rest))
        return True

    def take_copies(self) -> list[Copy]:
        """What must be copied before the next step writes, in this order; each is given once.

        A source may have been freed and taken by somebody else since: its content stays until a
        step writes there.
        """
        copies, self._copies = self._copies, []
        return copies

    def free(self, sequence_id: str) -> None:
        """Give up the sequence's table; blocks that nobody else holds return to the pool."""
        for block in reversed(self._tables.pop(sequence_id, [])):
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.appendleft(block)

    def check(self) -> None:
        """Raise AssertionError unless every block is free once or held as often as counted."""
        held = Counter(block for table in self._tables.values() for block in table)
        free = Counter(self._free)
        for block in range(self.num_blocks):
            assert held[block] == self._references[block], (
                f"block {block} is in {held[block]} tables, counted {self._references[block]}"
            )
            assert free[block] == (held[block] == 0), (
                f"block {block} is free {free[block]} times and held {held[block]} times"
            )
        assert sum(free.values()) <= self.num_blocks
        for sequence_id, table in self._tables.items():
            assert len(set(table)) == len(table), f"{sequence_id} holds a block twice: {table}"
