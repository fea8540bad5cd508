"""How much the server takes on at once: a bound on the queue, and the door that closes at shutdown.

The engine runs `max_running` sequences and lets the rest wait. Without a bound the queue grows
until every client has timed out and the server still computes their answers. Counted are
sequences (a completion of four prompts is four), from the moment they are let in until their
answer is complete or given up.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import contextmanager

from qtool.runtime.server.errors import invalid, unavailable

MAX_RETRY_AFTER_SECONDS = 60
# Weight of the newest answer in the running mean of how long answers take.
NEWEST_WEIGHT = 0.1


class Admission:
    """Counts the sequences inside; refuses above the limit."""

    def __init__(self, *, max_running: int, max_queued: int) -> None:
        self.max_running = max_running
        self.limit = max_running + max_queued
        self.num_inside = 0
        self._mean_seconds = 1.0
        self._closed = False
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def is_open(self) -> bool:
        return not self._closed

    def close(self) -> None:
        """From now on everything new is refused; what is inside may finish."""
        self._closed = True

    @contextmanager
    def enter(self, num_sequences: int) -> Iterator[None]:
        """Hold places for the sequences of one request, or tell the client to come back."""
        if self._closed:
            raise unavailable(
                "The server is shutting down", code="shutting_down", retry_after_seconds=5
            )
        if num_sequences > self.limit:
            raise invalid(
                f"The request has {num_sequences} prompts, at most {self.limit} are taken at once",
                param="prompt",
            )
        if self.num_inside + num_sequences > self.limit:
            raise unavailable(
                f"The queue is full: {self.num_inside} sequences are running or waiting, the "
                f"limit is {self.limit}",
                code="queue_full",
                retry_after_seconds=self._seconds_until_room(),
            )
        self.num_inside += num_sequences
        self._empty.clear()
        try:
            yield
        finally:
            self.num_inside -= num_sequences
            if self.num_inside == 0:
                self._empty.set()

    async def wait_until_empty(self) -> None:
        await self._empty.wait()

    def answered(self, seconds: float) -> None:
        """Take note of how long one answer took; the basis of `Retry-After`."""
        self._mean_seconds += NEWEST_WEIGHT * (seconds - self._mean_seconds)

    def _seconds_until_room(self) -> int:
        # A slot comes free every mean/max_running seconds; the queue ahead needs as many slots as
        # it is long.
        waiting = max(self.num_inside - self.max_running, 1)
        return min(
            max(math.ceil(self._mean_seconds * waiting / self.max_running), 1),
            MAX_RETRY_AFTER_SECONDS,
        )
