"""The other ranks as rank 0 has them: a process each, and a socket to talk to it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from dataclasses import asdict, dataclass

from qtool.runtime.parallel.message import Channel, Text, encode
from qtool.runtime.parallel.process_group import Backend
from qtool.settings import child_environment


@dataclass(frozen=True)
class Errand:
    """What another rank is told to load, and how.

    model            a path
    activations      and lm_head: as in `PackingRules`
    meeting          the file where the ranks meet
    num_threads      that it computes with on a CPU
    timeout_seconds  after which a rank that is silent is given up
    """

    model: str
    dtype: str
    device: str
    activations: str | None
    lm_head: str
    rank: int
    size: int
    meeting: str
    backend: Backend
    num_threads: int
    timeout_seconds: float

    def text(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Errand:
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    rank: int
    process: subprocess.Popen[bytes]
    channel: Channel


def spawn(rank: int, errand: Errand) -> Member:
    """Start a rank, which reads its errand from its socket."""
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-m", "qtool.runtime.parallel.follower", str(theirs.fileno())],
            pass_fds=(theirs.fileno(),),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=child_environment(PYTHONSAFEPATH="1"),
        )
    channel = Channel(ours)
    channel.send(encode(Text(errand.text())))
    return Member(rank, process, channel)
