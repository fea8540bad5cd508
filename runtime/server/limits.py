"""How much the server takes on at once: a bound on the queue, and the door that closes at shutdown.

The engine runs `max_running` sequences and lets the rest wait. Without a bound the queue grows
until every client has timed out and the server still computes their answers. Counted are
sequences (a completion of four prompts is four), from the moment they are let in until their
answer is complete or given up. Too many are a 429, over all clients or of one of them: whoever is
refused may come back. A server that stops is a 503: another one may be there by then.

A client is an API key where keys are asked for, else the address that it connects from.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qtool.runtime.server.errors import invalid, too_many, unavailable

MAX_RETRY_AFTER_SECONDS = 60
# Weight of the newest answer in the running mean of how long answers take.
NEWEST_WEIGHT = 0.1


def client_of(scope: Mapping[str, Any]) -> str:
    """Who is counted as one client; see above."""
    key: str | None = scope.get("api_key")
    address = scope.get("client")
    return key or (address[0] if address else "unix")


class Admission:
    """Counts the sequences inside; refuses above the limit."""

    def __init__(
        self, *, max_running: int, max_queued: int, max_per_client: int | None = None
    ) -> None:
        """max_per_client: running and waiting ones of one client; None: as many as fit."""
        self.max_running = max_running
        self.limit = max_running + max_queued
        self.num_inside = 0
        self._max_per_client = max_per_client or self.limit
        self._inside_by_client: Counter[str] = Counter()
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
    def enter(self, num_sequences: int, client: str = "") -> Iterator[None]:
        """Hold places for the sequences of one request, or tell the client to come back."""
        if self._closed:
            raise unavailable(
                "The server is shutting down", code="shutting_down", retry_after_seconds=5
            )
        most = min(self.limit, self._max_per_client)
        if num_sequences > most:
            raise invalid(
                f"The request has {num_sequences} prompts, at most {most} are taken at once",
                param="prompt",
            )
        if self.num_inside + num_sequences > self.limit:
            raise too_many(
                f"The queue is full: {self.num_inside} sequences are running or waiting, the "
                f"limit is {self.limit}",
                code="queue_full",
                retry_after_seconds=self._seconds_until_room(),
            )
        if self._inside_by_client[client] + num_sequences > self._max_per_client:
            raise too_many(
                f"{self._inside_by_client[client]} sequences of yours are running or waiting, the "
                f"limit for one client is {self._max_per_client}",
                code="client_limit",
                retry_after_seconds=self._seconds_until_room(),
            )
        self.num_inside += num_sequences
        self._inside_by_client[client] += num_sequences
        self._empty.clear()
        try:
            yield
        finally:
            self.num_inside -= num_sequences
            self._inside_by_client[client] -= num_sequences
            if not self._inside_by_client[client]:
                del self._inside_by_client[client]
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
