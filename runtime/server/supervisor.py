"""What a service manager is told about this process: sd_notify(3), without its library.

systemd gives a service of Type=notify a datagram socket. READY=1 ends its start; with WatchdogSec=
set it expects WATCHDOG=1 within that time again and again, and restarts what stays silent. Both are
said only while the engine is healthy.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass

from qtool.settings import settings


@dataclass(frozen=True, slots=True)
class Supervisor:
    """
    address           of the socket; None: nobody asked to be told
    watchdog_seconds  time within which a sign of life is expected; None: at no time
    """

    address: str | None = None
    watchdog_seconds: float | None = None

    @classmethod
    def of_environment(cls) -> Supervisor:
        found = settings()
        return cls(found.notify_socket, found.watchdog_seconds)

    def tell(self, state: str) -> None:
        if self.address is None:
            return
        # "@" begins the name of a socket that is in no folder.
        address = f"\0{self.address[1:]}" if self.address.startswith("@") else self.address
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            try:
                out.sendto(state.encode(), address)
            except OSError:
                # Nobody listens any more: the watchdog will act on the silence.
                return

    async def watch(self, healthy: Callable[[], bool]) -> None:
        """Signs of life, twice as often as they must come, while the engine is healthy."""
        if self.address is None or self.watchdog_seconds is None:
            return
        while True:
            if healthy():
                self.tell("WATCHDOG=1")
            await asyncio.sleep(self.watchdog_seconds / 2)
