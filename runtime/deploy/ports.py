"""Whether an address can be had, asked before a model is loaded for it."""

from __future__ import annotations

import socket

from qtool.errors import QtoolError
from qtool.runtime.server.serve import bind

CONNECT_SECONDS = 5.0


def check_free(host: str, port: int) -> None:
    """Raise UsageError where a server could not listen there."""
    if port:
        bind(host, port).close()


def check_reachable(address: str, default_port: int) -> None:
    """Raise QtoolError unless something listens at HOST:PORT; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    host, number = (host, int(port)) if host and port.isdigit() else (address, default_port)
    try:
        socket.create_connection((host, number), CONNECT_SECONDS).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise QtoolError(
            f"no Ray cluster answers at {host}:{number}: {reason}",
            "start one with `ray start --head`, name the head's address (its port is 6379 unless "
            "told otherwise), or leave --address out to start one here",
        ) from None
