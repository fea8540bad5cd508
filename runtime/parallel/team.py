"""Rank 0's side of a tensor-parallel group: starts the other ranks, tells them every step, notices
when one is gone.

    rank 0 (this process)                      ranks 1, 2, ... (processes of their own)
    Team.start, then its own part              read their part of the weights, say "loaded"
    Team.together(Step(...)) --- sockets --->  run the same step on their part
            model <----- sums and gathers (gloo, NCCL) -----> model

Rank 0 alone schedules and samples. Between steps the others wait on a socket and use no CPU. They
end when that socket closes, so none outlives this process, however it ends; and a thread here waits
for theirs, so that a rank which ends is noticed also when nothing runs. What it ended with becomes
the error of every request, and of `Team.together` from then on: ranks that miss a sum cannot go on.
"""

from __future__ import annotations

import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from torch import Tensor

from qtool.runtime.engine.client import EngineLost
from qtool.runtime.parallel.heartbeat import sum_seconds
from qtool.runtime.parallel.members import Errand, Member, spawn
from qtool.runtime.parallel.message import Message, Pass, encode
from qtool.runtime.parallel.process_group import Backend, CutOff, ProcessGroup
from qtool.runtime.parallel.watch import Watch

# A sum that fails because a rank has ended is known a moment later to be that.
DIAGNOSIS_SECONDS = 5.0


class RankLost(EngineLost):
    """A rank has ended, and with it what the ranks do together."""

    def __init__(self, message: str) -> None:
        super().__init__(
            message,
            "start again; a rank that was killed may have been killed for memory (see dmesg): use "
            "fewer bits, or a smaller --kv-cache-memory-bytes",
        )


class Team:
    """All ranks of one model.

    weight_bytes  of each rank's part, known once all are loaded
    """

    def __init__(
        self,
        members: Sequence[Member],
        folder: Path,
        cleanup: Callable[[], None],
        at_end: Callable[[], None],
        timeout_seconds: float,
    ) -> None:
        self._members = tuple(members)
        self._meeting = folder / "meeting"
        self._watch = Watch(self._members, timeout_seconds)
        self._sum_seconds = sum_seconds(timeout_seconds)
        self._turn = threading.RLock()
        self._group: ProcessGroup | None = None
        self._num_runners = 0
        self.weight_bytes: tuple[int, ...] = ()
        self._at_end = at_end
        # Also at the end of the process, and when nobody holds this any more.
        self._end = weakref.finalize(self, _end, self._watch, cleanup)

    @classmethod
    def start(
        cls,
        size: int,
        errand: Callable[[int, Path], Errand],
        at_end: Callable[[], None] = lambda: None,
        *,
        timeout_seconds: float,
    ) -> Team:
        """
        errand           (rank, the file where the ranks meet) -> what that rank is to do
        at_end           called once, when they have been stopped or could not be started
        timeout_seconds  after which a rank that is silent is given up
        """
        folder = tempfile.TemporaryDirectory(prefix="qtool-ranks-")
        meeting = Path(folder.name) / "meeting"
        members: list[Member] = []
        try:
            for rank in range(1, size):
                members.append(spawn(rank, errand(rank, meeting)))
        except BaseException:
            _end(Watch(members, timeout_seconds), folder.cleanup)
            at_end()
            raise
        return cls(members, Path(folder.name), folder.cleanup, at_end, timeout_seconds)

    @property
    def size(self) -> int:
        return 1 + len(self._members)

    @property
    def pids(self) -> tuple[int, ...]:
        """Of ranks 1, 2, ..."""
        return tuple(member.process.pid for member in self._members)

    @property
    def lost(self) -> RankLost | None:
        """The error, once a rank has ended."""
        return None if self._watch.lost is None else RankLost(self._watch.lost)

    def on_lost(self, listener: Callable[[RankLost], None]) -> None:
        """Call it once, in another thread, when a rank has ended; at once if one has."""
        self._watch.on_lost(lambda text: listener(RankLost(text)))

    def meet(self, backend: Backend) -> ProcessGroup:
        """Wait for the others and join them; raises what kept one of them from coming."""
        self._watch.wait_for("arrived")
        self._raise_if_lost()
        try:
            self._group = ProcessGroup(
                0, self.size, self._meeting, backend, timeout_seconds=self._sum_seconds
            )
        except CutOff as error:
            raise self._diagnosed(error) from error
        self._watch.on_lost(lambda _, group=self._group: group.abort())  # type: ignore[misc]
        return self._group

    def wait_until_loaded(self, own_bytes: int) -> None:
        """own_bytes  of the weights that rank 0 has"""
        found = self._watch.wait_for("loaded")
        self._raise_if_lost()
        self.weight_bytes = (own_bytes, *(found[member.rank] for member in self._members))

    def new_runner(self) -> int:
        self._num_runners += 1
        return self._num_runners

    def tell(self, message: Message) -> None:
        """What the others do by themselves."""
        with self.together(message):
            pass

    def full_pass(self, tokens: Tensor, *, logits: bool) -> AbstractContextManager[None]:
        """For a pass without a cache over independent sequences [batch, tokens], run meanwhile."""
        return self.together(Pass(tokens.shape[0], logits, tokens.flatten().tolist()))

    @contextmanager
    def together(self, message: Message) -> Iterator[None]:
        """Tell the others, and do here meanwhile what they do; raises RankLost if that fails here
        or there, after which nothing can be done together any more.
        """
        frame = encode(message)
        with self._turn:
            self._raise_if_lost()
            try:
                for member in self._members:
                    member.channel.send(frame)
                yield
            except Exception as error:
                raise self._diagnosed(error) from error
            except BaseException as error:  # Ctrl-C: the others wait for a sum that does not come
                self._watch.lose(f"rank 0 was interrupted: {type(error).__name__}")
                raise

    def stop(self) -> None:
        """End the other ranks."""
        if self._end.alive:
            self._end()
            self._at_end()

    def _raise_if_lost(self) -> None:
        if (lost := self.lost) is not None:
            raise lost

    def _diagnosed(self, error: Exception) -> RankLost:
        """Of a failure here: the rank whose end it comes from, or this one's own."""
        if isinstance(error, CutOff | OSError):
            self._watch.wait_until_lost(DIAGNOSIS_SECONDS)
        self._watch.lose(f"rank 0 failed: {error or type(error).__name__}")
        lost = self.lost
        assert lost is not None
        return lost


def _end(watch: Watch, cleanup: Callable[[], None]) -> None:
    watch.end()
    cleanup()
