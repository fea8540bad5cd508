"""Signs of life between ranks: one that is stopped or swapped out is noticed, also while idle.

Every rank but 0 says that it is there a few times within the timeout, from a thread of its own, and
rank 0 counts the times that it should have. Not the seconds: where the whole group is stopped
(Ctrl-Z) and goes on later, nobody has been silent for longer than the others.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

# Signs within the timeout; a rank is given up when all of them are missing.
BEATS = 4


def period(timeout_seconds: float) -> float:
    """Seconds between two signs."""
    return timeout_seconds / BEATS


def sum_seconds(timeout_seconds: float) -> float:
    """After which a sum is given up: longer, so that a rank which is stopped has been named."""
    return 2 * timeout_seconds


def beat(send: Callable[[], None], timeout_seconds: float) -> None:
    """Send signs of life for ever, in a thread, until one cannot be sent."""

    def run() -> None:
        pause = threading.Event()
        while True:
            try:
                send()
            except OSError:
                return
            pause.wait(period(timeout_seconds))

    threading.Thread(target=run, name="qtool-alive", daemon=True).start()


class Silence:
    """How many signs in a row each rank owes. One that has not said anything yet owes none: it is
    still being started.
    """

    def __init__(self) -> None:
        self._missed: dict[int, int] = {}

    def heard(self, rank: int) -> None:
        self._missed[rank] = 0

    def ended(self, rank: int) -> None:
        self._missed.pop(rank, None)

    def tick(self) -> list[int]:
        """Once a period: the ranks that have been silent for too long."""
        for rank in self._missed:
            self._missed[rank] += 1
        # The first tick comes when a sign may be under way.
        return [rank for rank, missed in self._missed.items() if missed > BEATS]


def state_of(pid: int) -> str:
    """What the system says of a process, such as "T (stopped)"; empty where it says nothing."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line[:6] == "State:"), "")
