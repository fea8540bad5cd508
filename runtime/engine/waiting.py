"""Who is next: sequences that wait, in the order of their turn, and who may go before it.

A turn is (priority, arrival), or arrival alone: lower is earlier. Preempted sequences keep theirs
and so stand at the front again.

Whose prompt begins with something that the cache holds is cheaper now than later, when it may be
gone. So among the first `AFFINITY_WINDOW` of one priority the one with most tokens in the cache
goes first. Nobody is passed over more than `MAX_OVERTAKEN` times: past such a sequence nobody goes.

Whose prompt begins with what a running sequence is just computing waits for it to be done, and
others may go first meanwhile: computing it a second time would delay everybody.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from itertools import count, islice

from qtool.runtime.engine.blocks import Match
from qtool.runtime.engine.prefix_tree import Node
from qtool.runtime.engine.sequence import Sequence

AFFINITY_WINDOW = 32
MAX_OVERTAKEN = 8

Turn = tuple[int, int]


class Waiting:
    """by_priority  whether requests' priorities count; else first come, first served"""

    def __init__(self, *, by_priority: bool) -> None:
        self._by_priority = by_priority
        self._order = count()
        self._turns: dict[Sequence, Turn] = {}
        self._queue: list[tuple[Turn, Sequence]] = []
        self._pending: dict[Sequence, Node] = {}
        self._num_overtaken: dict[Sequence, int] = {}
        self._deadlines: list[tuple[float, Turn, Sequence]] = []

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[Sequence]:
        return (sequence for _, sequence in self._queue)

    def __contains__(self, sequence: Sequence) -> bool:
        turn = self._turns.get(sequence)
        if turn is None:
            return False
        index = bisect_left(self._queue, turn, key=_turn)
        return index < len(self._queue) and self._queue[index][0] == turn

    def turn(self, sequence: Sequence) -> Turn:
        """Of a sequence that waits or has waited here, until it is forgotten."""
        return self._turns[sequence]

    def priority(self, sequence: Sequence) -> int:
        return self._turns[sequence][0]

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait, or one that has been here before, at its old place."""
        self.know(sequence)
        insort(self._queue, (self._turns[sequence], sequence), key=_turn)

    def know(self, sequence: Sequence) -> None:
        """Give a sequence its turn, without letting it wait."""
        if sequence in self._turns:
            return
        priority = sequence.request.priority if self._by_priority else 0
        turn = self._turns[sequence] = priority, next(self._order)
        if sequence.deadline is not None:
            heapq.heappush(self._deadlines, (sequence.deadline, turn, sequence))

    def take(self, sequence: Sequence) -> None:
        """Take a sequence out of the queue: it runs."""
        del self._queue[bisect_left(self._queue, self._turns[sequence], key=_turn)]
        self._pending.pop(sequence, None)
        self._num_overtaken.pop(sequence, None)

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        if sequence in self:
            self.take(sequence)
        del self._turns[sequence]

    def expired(self, now: float) -> list[Sequence]:
        """Sequences that wait or run and whose deadline has passed, each once."""
        found = []
        while self._deadlines and self._deadlines[0][0] <= now:
            _, _, sequence = heapq.heappop(self._deadlines)
            if sequence in self._turns:
                found.append(sequence)
        return found

    def next(self, look_up: Callable[[Sequence], Match]) -> Sequence | None:
        """Whose turn it is, of those whose prompt nobody is computing now."""
        best: Sequence | None = None
        most = -1
        for sequence in islice(self._ready(), AFFINITY_WINDOW):
            if best is not None and self.priority(sequence) != self.priority(best):
                break
            match = look_up(sequence)
            if match.pending is not None:
                self._pending[sequence] = match.pending
                continue
            if match.num_tokens > most:
                best, most = sequence, match.num_tokens
            if self._num_overtaken.get(sequence, 0) >= MAX_OVERTAKEN:
                break
        return best

    def first(self) -> Sequence | None:
        """Whose turn it would be if the cache did not matter."""
        return next(self._ready(), None)

    def overtake(self, sequence: Sequence) -> None:
        """A sequence goes first: those before it that could have gone are passed over once more."""
        turn = self._turns[sequence]
        for other in self._ready():
            if self._turns[other] >= turn:
                return
            self._num_overtaken[other] = self._num_overtaken.get(other, 0) + 1

    def _ready(self) -> Iterator[Sequence]:
        """In order, without those who wait for somebody else's blocks, or for a token of their own
        to be read (preempted while a step ran).
        """
        for _, sequence in self._queue:
            if sequence.num_unread_tokens:
                continue
            node = self._pending.get(sequence)
            if node is not None and node.is_pending:
                continue
            self._pending.pop(sequence, None)
            yield sequence


def _turn(entry: tuple[Turn, Sequence]) -> Turn:
    return entry[0]
