"""Waits for what the other ranks say, and for their end.

A rank says "arrived" when it is about to join the others, "loaded" with its bytes of weights,
"alive" a few times within the timeout, and "failed" with the reason before it ends by itself. One
that ends without that was killed, one that is silent is stopped or swapped out. One that says "cut
off" missed a sum: whoever ended first is the reason, and is given a moment to be found.
"""

from __future__ import annotations

import json
import selectors
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from typing import Literal

from qtool.runtime.parallel.heartbeat import Silence, period, state_of
from qtool.runtime.parallel.members import Member
from qtool.runtime.parallel.message import Stop, Text, encode

# A rank that has closed its socket is about to end.
LAST_SECONDS = 10.0
# One that was told to stop ends within a moment (`follower.LAST_WORD_SECONDS`), if it can.
STOP_SECONDS = 30.0
# How long after it a rank's end is known, by which others were cut off.
REASON_SECONDS = 1.0

Said = Literal["arrived", "loaded", "alive"]


class Watch:
    """lost: what ended the group, in words, also when it was `end`; None while all are there."""

    def __init__(self, members: Sequence[Member], timeout_seconds: float) -> None:
        """timeout_seconds  after which a rank that is silent is given up"""
        self._members = tuple(members)
        self._timeout_seconds = timeout_seconds
        self._changed = threading.Condition()
        self._said: dict[str, dict[int, int]] = {"arrived": {}, "loaded": {}, "alive": {}}
        self._listeners: list[Callable[[str], None]] = []
        self._ending = False
        # Ranks that have said why they end.
        self._explained: set[int] = set()
        self.lost: str | None = None
        if members:
            threading.Thread(target=self._run, name="qtool-ranks", daemon=True).start()

    def wait_for(self, said: Said) -> dict[int, int]:
        """Until all ranks have said it, or one is lost: rank -> the number that was said."""
        with self._changed:
            self._changed.wait_for(
                lambda: self.lost is not None or len(self._said[said]) == len(self._members)
            )
            return dict(self._said[said])

    def wait_until_lost(self, seconds: float) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, seconds)

    def on_lost(self, listener: Callable[[str], None]) -> None:
        with self._changed:
            if self.lost is None:
                self._listeners.append(listener)
                return
        listener(self.lost)

    def lose(self, text: str) -> None:
        """Give the group up, for the first reason that is given; the other ranks are ended."""
        with self._changed:
            if self._ending or self.lost is not None:
                return
            self.lost = text
            listeners, self._listeners = self._listeners, []
            self._changed.notify_all()
        for member in self._members:
            member.process.kill()
        for listener in listeners:
            listener(text)

    def end(self) -> None:
        """Let the ranks end, and wait until they have."""
        with self._changed:
            self._ending = True
            self._listeners = []
            self.lost = self.lost or "the model was closed, and with it its other ranks"
            self._changed.notify_all()
        for member in self._members:
            try:
                member.channel.send(encode(Stop()))
                member.channel.socket.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # it has ended before
        for member in self._members:
            try:
                member.process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                member.process.kill()
                member.process.wait()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for member in self._members:
                selector.register(member.channel.socket, selectors.EVENT_READ, member)
            silence = Silence()
            pause = period(self._timeout_seconds)
            next_tick = time.monotonic() + pause
            while selector.get_map():
                for key, _ in selector.select(max(next_tick - time.monotonic(), 0.0)):
                    silence.heard(key.data.rank)
                    if not self._hear(key.data):
                        silence.ended(key.data.rank)
                        selector.unregister(key.fileobj)
                        key.data.channel.close()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + pause
                    self._give_up(silence.tick())

    def _give_up(self, silent: Sequence[int]) -> None:
        """Ranks that have not been heard of for too long."""
        for member in self._members:
            if member.rank in silent:
                pid = member.process.pid
                state = state_of(pid)
                self.lose(
                    f"rank {member.rank} of {1 + len(self._members)} (process {pid}"
                    f"{f', {state}' if state else ''}) has not been heard of for "
                    f"{self._timeout_seconds:g} s"
                )

    def _hear(self, member: Member) -> bool:
        """Take what a rank says; False when it says no more."""
        message = member.channel.receive()
        if message is None:
            if not self._ending:
                end = self._ended(member)
                if member.rank not in self._explained:
                    self.lose(end)
            return False
        assert isinstance(message, Text), message
        said = json.loads(message.text)
        who = f"rank {member.rank} of {1 + len(self._members)}"
        if "failed" in said:
            self._explained.add(member.rank)
            self.lose(f"{who} failed: {said['failed']}")
            return True
        if "cut off" in said:
            reason = f"{who} waited for the others in vain: {said['cut off']}"
            self._explained.add(member.rank)
            threading.Timer(REASON_SECONDS, self.lose, (reason,)).start()
            return True
        with self._changed:
            for word, number in said.items():
                self._said[word][member.rank] = number
            self._changed.notify_all()
        return True

    def _ended(self, member: Member) -> str:
        process = member.process
        who = f"rank {member.rank} of {1 + len(self._members)} (process {process.pid})"
        try:
            status = process.wait(LAST_SECONDS)
        except subprocess.TimeoutExpired:
            return f"{who} does not answer any more"
        if status < 0:
            return f"{who} was killed by {signal.Signals(-status).name}"
        return f"{who} ended with exit code {status}"
