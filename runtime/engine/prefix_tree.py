"""Which block of the pool holds which tokens after which others: a tree, a block of tokens a node.

Keys and values of a token depend on the tokens before it, and on nothing else but the adapter and
the salt under which they were computed (`scope`). So the cache is found by walking from a root, one
for each scope, along the tokens:

    root --[ 12 7 9 4 ]--> node, block 5 --[ 3 3 8 1 ]--> node, block 2
                                        \\-[ 3 3 9 9 ]--> node, block 7

Others keep a hash of the whole chain a block and trust it. Here a node is found by its parent and
its tokens, as bytes: Python hashes them (once an object) and compares them, so what is found is
what was asked for, without a cryptographic hash and without a chance of error.

A node can outlive its block. It stays while it has children, so that the way to them is known, and
goes with the last of them; a block computed anew then finds its node again.
"""

from array import array
from collections.abc import Hashable, Iterator, Sequence
from itertools import islice

TOKEN_BYTES = 4
# Siblings that are compared for a common beginning, the newest first.
MAX_COMPARED = 32


class Node:
    """A block of tokens after those of its parent.

    key    the tokens, int32 in bytes; fewer than a block only where nothing follows
    block  where their keys and values lie; None: nowhere any more
    ready  False while the sequence that holds the block is still about to compute them
    """

    __slots__ = ("block", "children", "key", "parent", "ready")

    def __init__(self, parent: "Node | None", key: bytes) -> None:
        self.parent = parent
        self.key = key
        self.block: int | None = None
        self.ready = False
        self.children: dict[bytes, Node] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.key) // TOKEN_BYTES

    @property
    def is_pending(self) -> bool:
        return self.block is not None and not self.ready


def key_of(token_ids: Sequence[int]) -> bytes:
    return array("i", token_ids).tobytes()


def num_common_tokens(one: bytes, other: bytes) -> int:
    """How many tokens two keys have in common from the left."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size // TOKEN_BYTES
    start = 0
    while one[start : start + TOKEN_BYTES] == other[start : start + TOKEN_BYTES]:
        start += TOKEN_BYTES
    return start // TOKEN_BYTES


class PrefixTree:
    def __init__(self) -> None:
        self._roots: dict[Hashable, Node] = {}

    def root(self, scope: Hashable) -> Node:
        """Where the prompts of a scope begin; a root without children is not kept."""
        return self._roots.get(scope) or Node(None, key_of(()))

    def insert(self, scope: Hashable, parent: Node, key: bytes) -> Node:
        """The child of an attached node, made if it is not there."""
        child = parent.children.get(key)
        if child is None:
            child = parent.children[key] = Node(parent, key)
            if parent.parent is None:
                self._roots[scope] = parent
        return child

    def is_attached(self, scope: Hashable, node: Node) -> bool:
        """Whether what is inserted below the node can be found from a root."""
        if node.parent is None:
            return self._roots.get(scope, node) is node
        return node.parent.children.get(node.key) is node

    def drop(self, scope: Hashable, node: Node) -> None:
        """The node's block is its own no more; forget the nodes that this leaves without use."""
        node.block = None
        node.ready = False
        while node.parent is not None and node.block is None and not node.children:
            parent = node.parent
            del parent.children[node.key]
            node = parent
        if node.parent is None and not node.children:
            self._roots.pop(scope, None)

    @staticmethod
    def closest_child(node: Node, key: bytes) -> tuple[Node, int] | None:
        """The child with most tokens in common with the key, of those that can be copied from."""
        best: tuple[Node, int] | None = None
        first = key[:TOKEN_BYTES]
        for child in islice(reversed(node.children.values()), MAX_COMPARED):
            if child.ready and child.key.startswith(first):
                common = num_common_tokens(child.key, key)
                if best is None or common > best[1]:
                    best = child, common
        return best

    def __iter__(self) -> Iterator[tuple[Hashable, Node]]:
        """Every node but the roots, parents first, with its scope."""
        for scope, root in self._roots.items():
            open_nodes = [root]
            while open_nodes:
                for child in open_nodes.pop().children.values():
                    yield scope, child
                    open_nodes.append(child)
