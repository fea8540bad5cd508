"""Who owns which block of the KV pool, and what the blocks hold that others may use again.

The pool is cut into blocks of `block_size` tokens. A sequence has a table: the blocks that hold its
tokens, in order, filled from the left. A full block never changes, which is what lets several
tables name the same one, each with a reference of its own.

    block_size 4, table [7, 2, 9], 10 tokens
    token  0 1 2 3 | 4 5 6 7 | 8 9 . .
    block     7    |    2    |    9          slot of token 5: 2 * 4 + 1 = 9

**Reuse.** What a block holds is known from when it is promised to a prompt, in a tree of tokens
(`prefix_tree`). `look_up` finds the blocks that a prompt begins with, `admit` takes references to
them; blocks freed keep their content until they are needed, the longest unused first, and of one
sequence the last first (whoever needs a block also needs those before it). Past the last full block
that fits, the beginning of a block that differs later is copied. At least one token is always
computed anew: it is where the next one comes from. Two prompts that arrive together and begin alike
are computed once: the blocks of the first are *pending* until it has filled them, and `look_up`
says so to the second, which can wait.

**Windows.** Where no layer sees farther back than `window` tokens, the blocks behind it are given
up while the sequence runs (`release`): their entries in the table stay, and mean nothing.

Conservation, checked by `check`: a block is blank, or free with content that the tree knows, or
held by as many tables as its reference count says; it is exactly one of the three (`block_pool`).
"""

from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from qtool.runtime.engine.block_pool import BlockPool
from qtool.runtime.engine.prefix_tree import Node, key_of


class Copy(NamedTuple):
    """The first `num_tokens` tokens of a block are to be copied into another block."""

    source: int
    target: int
    num_tokens: int


class Match(NamedTuple):
    """What the cache holds of a prompt.

    num_tokens  can be used now
    pending     the last of the blocks behind them that another sequence is about to fill
    """

    num_tokens: int
    pending: Node | None = None


class _Found(NamedTuple):
    """nodes: of the full blocks to share, behind `num_skipped` that no layer sees any more.
    tail: a node to copy the first `num_tail` tokens from.
    """

    nodes: list[Node]
    num_skipped: int
    tail: Node | None
    num_tail: int
    pending: Node | None


@dataclass(slots=True)
class _Table:
    """What the manager knows of a sequence, from its first look-up to `free`.

    token_ids     the sequence's own list, which grows
    keys          of its full blocks, as far as they have been needed
    nodes         of its full blocks, as far as the tree knows them; the root first
    num_computed  tokens whose keys and values its blocks hold
    num_released  entries of `blocks` that stand for blocks given up
    """

    token_ids: Sequence[int]
    scope: Hashable
    nodes: list[Node]
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    num_computed: int = 0
    num_released: int = 0

    @property
    def held(self) -> list[int]:
        return self.blocks[self.num_released :]


class BlockManager:
    """The blocks of one pool. Pure bookkeeping: it never touches a tensor.

    caching  whether what blocks hold is remembered
    window   tokens that a token sees, itself included, in the layer that sees most; None: all
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        caching: bool = True,
        window: int | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"{num_blocks} blocks of {block_size} tokens make no pool")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.caching = caching
        self.window = window
        self._pool = BlockPool(num_blocks)
        self._tree = self._pool.tree
        self._tables: dict[str, _Table] = {}
        self._copies: list[Copy] = []

    @property
    def num_free_blocks(self) -> int:
        return self._pool.num_free

    @property
    def num_cached_blocks(self) -> int:
        """Free blocks whose content can be found."""
        return self._pool.num_cached

    @property
    def num_freed_ever(self) -> int:
        """Rises whenever a block comes free."""
        return self._pool.num_freed_ever

    @property
    def usage(self) -> float:
        """Share of the pool that is held, 0 to 1."""
        return 1.0 - self.num_free_blocks / self.num_blocks

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def table(self, sequence_id: str) -> Sequence[int]:
        """The blocks of a sequence, in the order of its tokens; empty if it holds none."""
        table = self._tables.get(sequence_id)
        return () if table is None else table.blocks

    # Reuse

    def look_up(self, sequence_id: str, token_ids: Sequence[int], scope: Hashable = None) -> Match:
        """What the cache holds of a sequence that has no blocks yet.

        scope  only what was computed under an equal one is found
        """
        if not self.caching:
            return Match(0)
        found = self._find(self._table(sequence_id, token_ids, scope))
        num_full = found.num_skipped + len(found.nodes)
        return Match(num_full * self.block_size + found.num_tail, found.pending)

    def admit(
        self,
        sequence_id: str,
        token_ids: Sequence[int],
        scope: Hashable = None,
        *,
        num_tokens: int | None = None,
        spare_blocks: int = 0,
        reuse: bool = True,
    ) -> int | None:
        """Give a sequence without blocks room for its tokens, reusing what the cache holds of them.

        Returns how many tokens need not be computed. None if the free blocks do not suffice, with
        `spare_blocks` left over; nothing has changed then.

        token_ids   the sequence's own list: it is read again as it grows
        num_tokens  make room for so many only; default: for all
        reuse       False: compute everything, as where the prompt's logits are asked for
        """
        table = self._table(sequence_id, token_ids, scope)
        if table.blocks:
            raise ValueError(f"{sequence_id} already has blocks")
        found = self._find(table) if reuse and self.caching else _Found([], 0, None, 0, None)
        shared = [node.block for node in found.nodes if node.block is not None]
        num_full = found.num_skipped + len(shared)
        num_reused = num_full * self.block_size + found.num_tail
        wanted = len(token_ids) if num_tokens is None else num_reused + num_tokens
        num_new = max(self.blocks_for(min(wanted, len(token_ids))) - num_full, 0)
        num_revived = sum(self._pool.is_free(block) for block in shared)
        if num_new + num_revived + spare_blocks > self.num_free_blocks:
            return None
        source = None if found.tail is None else found.tail.block
        if source is not None:
            self._pool.touch(source)
        self._pool.share(shared)
        table.blocks = [0] * found.num_skipped + shared
        table.num_released = found.num_skipped
        table.nodes = self._path(table, num_full)
        table.num_computed = num_reused
        table.blocks.extend(self._pool.take(num_new))
        if source is not None:
            self._copies.append(Copy(source, table.blocks[num_full], found.num_tail))
        if self.caching:
            self._announce(table)
        return num_reused

    def computed(self, sequence_id: str, num_tokens: int) -> None:
        """The sequence's first num_tokens tokens are in its blocks now: others may use them."""
        table = self._tables[sequence_id]
        first, last = table.num_computed // self.block_size, num_tokens // self.block_size
        table.num_computed = num_tokens
        if self.caching:
            for index in range(first, last):
                self._remember(table, index)

    def _table(self, sequence_id: str, token_ids: Sequence[int], scope: Hashable) -> _Table:
        table = self._tables.get(sequence_id)
        if table is None:
            root = self._tree.root(scope)
            table = self._tables[sequence_id] = _Table(token_ids, scope, [root])
        return table

    def _key(self, table: _Table, index: int) -> bytes:
        """The key of a full block."""
        size = self.block_size
        for i in range(len(table.keys), index + 1):
            table.keys.append(key_of(table.token_ids[i * size : (i + 1) * size]))
        return table.keys[index]

    def _find(self, table: _Table) -> _Found:
        # The last token is left to compute, so the block that it ends is not looked for.
        usable = len(table.token_ids) - 1
        path: list[Node] = []
        node = self._tree.root(table.scope)
        for index in range(usable // self.block_size):
            child = node.children.get(self._key(table, index))
            if child is None:
                break
            path.append(child)
            node = child
        num_full = self._num_usable(path)
        pending = None
        for node in path[num_full:]:
            if not node.is_pending:
                break
            pending = node
        start = num_full * self.block_size
        above = path[num_full - 1] if num_full else self._tree.root(table.scope)
        rest = key_of(table.token_ids[start : min(usable, start + self.block_size)])
        tail = self._tree.closest_child(above, rest) if rest and pending is None else None
        skipped = self._num_hidden(num_full * self.block_size)
        return _Found(
            nodes=path[skipped:num_full],
            num_skipped=skipped,
            tail=tail[0] if tail else None,
            num_tail=tail[1] if tail else 0,
            pending=pending,
        )

    def _num_usable(self, path: list[Node]) -> int:
        """Of a path in the tree, how many blocks can stand for their tokens: all that are still
        seen must be there.
        """
        best = num_there = 0
        for count, node in enumerate(path, start=1):
            num_there = num_there + 1 if node.ready else 0
            if num_there >= count - self._num_hidden(count * self.block_size):
                best = count
            elif self.window is None:
                break
        return best

    def _num_hidden(self, position: int) -> int:
        """Blocks that no token at the position or behind it sees."""
        if self.window is None:
            return 0
        return max(position - self.window + 1, 0) // self.block_size

    def _path(self, table: _Table, num_full: int) -> list[Node]:
        """The nodes of the first blocks, which the tree is known to hold."""
        nodes = [self._tree.root(table.scope)]
        for index in range(num_full):
            nodes.append(nodes[-1].children[self._key(table, index)])
        return nodes

    def _announce(self, table: _Table) -> None:
        """Tell the tree which blocks the rest of a prompt will fill."""
        # With a window, what the prompt was found by may have been given up for its own blocks.
        if self._end_of_chain(table, len(table.nodes) - 1) is None:
            return
        last = min(len(table.token_ids) // self.block_size, len(table.blocks))
        for index in range(len(table.nodes) - 1, last):
            key = self._key(table, index)
            child = self._tree.insert(table.scope, table.nodes[-1], key)
            if child.block is not None:
                return  # somebody else's; what comes of it is seen when this block is full
            self._pool.remember(table.blocks[index], table.scope, child)
            table.nodes.append(child)

    def _remember(self, table: _Table, index: int) -> None:
        """A block is full: make it known, or take the block that is known in its place."""
        block = table.blocks[index]
        if index + 1 < len(table.nodes):
            announced = table.nodes[index + 1]
            announced.ready = announced.block == block
            return
        parent = self._end_of_chain(table, index)
        if parent is None:
            return
        child = self._tree.insert(table.scope, parent, self._key(table, index))
        if child.block is None:
            self._pool.remember(block, table.scope, child)
            child.ready = True
        elif child.ready:
            # Computed twice: one is enough, and the chain of a table stays in the tree.
            self._pool.share([child.block])
            table.blocks[index] = child.block
            self._pool.give_back(block)
        else:
            return  # another's promise; this table is known no farther than here
        table.nodes.append(child)

    def _end_of_chain(self, table: _Table, index: int) -> Node | None:
        """The node below which the tokens of a table's block belong; None if the tree has lost the
        way to it.
        """
        if index == 0:
            table.nodes[0] = self._tree.root(table.scope)
        if index + 1 != len(table.nodes):
            return None
        parent = table.nodes[-1]
        return parent if self._tree.is_attached(table.scope, parent) else None

    def clear_cache(self) -> None:
        """Forget what free blocks hold."""
        self._pool.forget_all()

    # Growing, sharing, giving back

    def allocate(self, sequence_id: str, num_tokens: int) -> bool:
        """Grow the sequence's table until it holds num_tokens. All or nothing: False if the free
        blocks do not suffice, and nothing has changed.
        """
        table = self._tables[sequence_id]
        missing = self.blocks_for(num_tokens) - len(table.blocks)
        if missing > self.num_free_blocks:
            return False
        if missing > 0:
            table.blocks.extend(self._pool.take(missing))
        return True

    def fork(
        self, parent_id: str, child_id: str, token_ids: Sequence[int], num_tokens: int
    ) -> bool:
        """Give a new sequence the first num_tokens tokens of another's, which are computed.

        Full blocks are shared; of one that both would go on writing to, the child gets a copy.
        False if no block is free for that, or the parent has given up blocks that the child would
        see; nothing has changed then.

        token_ids  the child's own list
        """
        full, rest = divmod(num_tokens, self.block_size)
        parent = self._tables[parent_id]
        if rest and not self.num_free_blocks:
            return False
        if parent.num_released > self._num_hidden(num_tokens):
            return False
        if child_id in self._tables:
            raise ValueError(f"{child_id} already has a table")
        child = _Table(token_ids, parent.scope, parent.nodes[: full + 1])
        child.num_released = min(parent.num_released, full)
        child.blocks = parent.blocks[:full]
        child.num_computed = num_tokens
        self._tables[child_id] = child
        self._pool.share(child.held)
        if rest:
            child.blocks.extend(self._pool.take(1))
            self._copies.append(Copy(parent.blocks[full], child.blocks[full], rest))
        return True

    def take_copies(self) -> list[Copy]:
        """What must be copied before the next step writes, in this order; each is given once.

        A source may have been freed and taken by somebody else since: its content stays until a
        step writes there.
        """
        copies, self._copies = self._copies, []
        return copies

    def release(self, sequence_id: str) -> None:
        """Give up the blocks of a running sequence that no layer will see again."""
        table = self._tables[sequence_id]
        hidden = min(self._num_hidden(table.num_computed), len(table.blocks))
        for index in range(table.num_released, hidden):
            block, table.blocks[index] = table.blocks[index], 0
            self._pool.give_back(block)
        table.num_released = max(table.num_released, hidden)

    def free(self, sequence_id: str) -> None:
        """Give up the sequence's table; blocks that nobody else holds return to the pool."""
        table = self._tables.pop(sequence_id, None)
        if table is None:
            return
        if self.caching:
            self._remember_tail(table)
        for block in reversed(table.held):
            self._pool.give_back(block)

    def discard(self, sequence_id: str) -> None:
        """Free a sequence whose blocks hold nothing that anybody may read; see `take_dirty`.

        To be called after a step, when no copies are due: they may come from these blocks.
        """
        table = self._tables.pop(sequence_id, None)
        if table is None:
            return
        for block in table.held:
            self._pool.spoil(block)
        for block in reversed(table.held):
            self._pool.give_back(block)

    def take_dirty(self) -> list[int]:
        """Free blocks that must be zeroed before the next step; each is given once."""
        return self._pool.take_dirty()

    def _remember_tail(self, table: _Table) -> None:
        """What the last block of an ended sequence holds can be copied from, too."""
        full, rest = divmod(table.num_computed, self.block_size)
        if not rest or full < table.num_released:
            return
        while len(table.nodes) > full + 1:  # announced, and not to be computed any more
            promised = table.nodes.pop().block
            if promised is not None and promised == table.blocks[len(table.nodes) - 1]:
                self._pool.forget(promised)
        parent = self._end_of_chain(table, full)
        if parent is None:
            return
        start = full * self.block_size
        key = key_of(table.token_ids[start : start + rest])
        child = self._tree.insert(table.scope, parent, key)
        if child.block is None:
            self._pool.remember(table.blocks[full], table.scope, child)
            child.ready = True

    # The law

    def check(self) -> None:
        """Raise AssertionError unless blocks are conserved and the tree tells the truth of them."""
        self._pool.check(Counter(block for table in self._tables.values() for block in table.held))
        for sequence_id, table in self._tables.items():
            assert len(set(table.held)) == len(table.held), f"{sequence_id} holds a block twice"
            for block, node, key in zip(table.blocks, table.nodes[1:], table.keys, strict=False):
                assert node.key == key, f"{sequence_id} is not where the tree says"
                assert block in (node.block, 0) or not self._pool.is_readable(block, node), (
                    f"{sequence_id} has block {block}, and the tree {node.block} in its place"
                )
        for _, node in self._tree:
            assert not node.children or node.num_tokens == self.block_size
        assert self.caching or not any(True for _ in self._tree)
