"""The blocks of a pool: which are blank, which are free and remembered, which are held, how often.

    blank     free, and nobody knows what it holds
    cached    free, with content that the tree of prefixes knows, the longest unused first
    held      by as many tables as its reference count says; known to the tree, or not yet

`take` prefers blank blocks and then gives up the oldest content. `give_back` puts a block whose
content is known and complete at the young end of the cached ones, any other among the blank.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Hashable, Sequence

from qtool.runtime.engine.prefix_tree import Node, PrefixTree


class BlockPool:
    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.tree = PrefixTree()
        self.num_freed_ever = 0
        # Taken from the left and returned there, last block first: so blocks come in rising order,
        # the table of a sequence alone in the pool is one slice of it, and a little-used pool
        # touches little memory.
        self._blank: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()
        self._references = [0] * num_blocks
        self._nodes: dict[int, tuple[Hashable, Node]] = {}
        self._spoiled: set[int] = set()
        self._dirty: list[int] = []

    @property
    def num_free(self) -> int:
        return len(self._blank) + len(self._cached)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def is_free(self, block: int) -> bool:
        return self._references[block] == 0

    def take(self, count: int) -> list[int]:
        """Blocks for new content, of which there are enough."""
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                self.forget(block)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each; a cached block is held from now on."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def give_back(self, block: int) -> None:
        """One reference less."""
        self._references[block] -= 1
        if self._references[block] > 0:
            return
        self.num_freed_ever += 1
        known = self._nodes.get(block)
        if known is not None and known[1].ready:
            self._cached[block] = None
            return
        if known is not None:
            self.forget(block)  # promised, and not computed
        if block in self._spoiled:
            self._spoiled.remove(block)
            self._dirty.append(block)
        self._blank.appendleft(block)

    # Content

    def knows(self, block: int) -> bool:
        return block in self._nodes

    def remember(self, block: int, scope: Hashable, node: Node) -> None:
        """The block holds, or will hold, the tokens of a node that had none."""
        node.block = block
        self._nodes[block] = (scope, node)

    def forget(self, block: int) -> None:
        """The block's content is not to be found any more."""
        scope, node = self._nodes.pop(block)
        self.tree.drop(scope, node)

    def touch(self, block: int) -> None:
        """The content has been of use: it is given up last."""
        if block in self._cached:
            self._cached.move_to_end(block)

    def forget_all(self) -> None:
        """Forget what free blocks hold."""
        while self._cached:
            block, _ = self._cached.popitem(last=False)
            self.forget(block)
            self._blank.append(block)

    def spoil(self, block: int) -> None:
        """What a held block holds nobody may read again, nor leave behind for who takes it next."""
        if self.knows(block):
            self.forget(block)
        self._spoiled.add(block)

    def is_readable(self, block: int, node: Node) -> bool:
        """Whether a held block can be what stands for a node: neither was spoiled or given up."""
        return node.block is not None and block not in self._spoiled

    def take_dirty(self) -> list[int]:
        """Free blocks that were spoiled; each is given once."""
        dirty, self._dirty = self._dirty, []
        return dirty

    def check(self, held: Counter[int]) -> None:
        """Raise AssertionError unless every block is in one of its three states, and the tree tells
        the truth of them.

        held  in how many tables each block is
        """
        blank = Counter(self._blank)
        for block in range(self.num_blocks):
            assert held[block] == self._references[block], (
                f"block {block} is in {held[block]} tables, counted {self._references[block]}"
            )
            places = blank[block] + (block in self._cached) + (held[block] > 0)
            assert places == 1, (
                f"block {block} is blank {blank[block]} times, cached {block in self._cached}, "
                f"held {held[block]} times"
            )
        assert len(self._blank) + len(self._cached) + len(+held) == self.num_blocks
        in_tree = {node.block: (scope, node) for scope, node in self.tree}
        in_tree.pop(None, None)
        assert in_tree == self._nodes, "the tree and the blocks name different content"
        for scope, node in self.tree:
            assert self.tree.is_attached(scope, node)
            assert node.block is not None or node.children, "a node that leads nowhere"
        for block in self._cached:
            assert self._nodes[block][1].ready, f"block {block} is cached and was never filled"
