"""Running the app: a socket bound before the model is loaded, and a stop that lets answers finish.

On SIGTERM or Ctrl-C: no new connections, new requests on old ones get 503, running answers get
`shutdown_timeout` seconds, what is left is ended with an error event, exit code 0. A second signal
ends everything at once. uvicorn's own handling would raise the signal again after its shutdown, and
the process would report death by signal to a supervisor that asked it politely.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import uvicorn

from qtool.errors import QtoolError, UsageError
from qtool.runtime.server.app import create_app
from qtool.runtime.server.asgi import App
from qtool.runtime.server.config import ServerConfig, Tls
from qtool.runtime.server.pool import ModelPool, PoolApp
from qtool.runtime.server.service import Service, logger
from qtool.runtime.tokenizer import Tokenizer

# After the drain every answer has ended; connections get this long to take their last bytes.
LAST_BYTES_SECONDS = 2.0
LAST_BYTES_TRIES = 40


def bind(host: str, port: int) -> socket.socket:
    """A bound socket; port 0 picks a free one. Bound early, a taken port costs no model load."""
    if not 0 <= port <= 65535:
        raise UsageError(f"port {port} does not exist", "ports go from 1 to 65535; 0 picks one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except socket.gaierror as error:
        raise UsageError(f"host {host!r}: {error.strerror}", "127.0.0.1 or 0.0.0.0?") from None
    # The protocol is named: asyncio sets TCP_NODELAY only on sockets that say they are TCP, and
    # without it an answer written as headers and body waits 44 ms for the client's delayed ACK.
    bound = socket.socket(family, kind, protocol)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _cannot_bind(host, port, error) from None
    return bound


def _cannot_bind(host: str, port: int, error: OSError) -> QtoolError:
    if error.errno == errno.EADDRINUSE:
        return UsageError(
            f"port {port} on {host} is in use",
            "pass another --port, or --port 0 to pick a free one",
        )
    if error.errno == errno.EACCES:
        return UsageError(f"port {port} is not allowed for this user", "pass a --port above 1023")
    return UsageError(f"cannot listen on {host}:{port}: {error.strerror}", "try --host 127.0.0.1")


def bind_unix(path: str) -> socket.socket:
    """A bound Unix socket; one that a server which is gone has left behind is replaced."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if stat.S_ISSOCK(os.stat(path).st_mode) and not _answers(path):
            os.unlink(path)
    except FileNotFoundError:
        pass
    try:
        bound.bind(path)
    except OSError as error:
        bound.close()
        raise UsageError(f"cannot listen on {path}: {error.strerror}") from None
    return bound


def _answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as tried:
        try:
            tried.connect(path)
        except OSError:
            return False
    return True


def url_of(bound: socket.socket, tls: Tls | None = None) -> str:
    """Where to reach a bound socket from this machine."""
    if bound.family == socket.AF_UNIX:
        return f"unix:{bound.getsockname()}"
    scheme = "http" if tls is None else "https"
    host, port = bound.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1" if bound.family == socket.AF_INET else "::1"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers."""

    def __init__(self, app: App, config: ServerConfig) -> None:
        tls = config.tls or Tls("")
        super().__init__(
            uvicorn.Config(
                app,
                root_path=config.root_path,
                ssl_certfile=tls.certificate or None,
                ssl_keyfile=tls.key,
                ssl_keyfile_password=tls.password,
                ssl_ca_certs=tls.client_authorities,
                ssl_cert_reqs=tls.client_certificates,
                log_config=None,
                log_level="warning",
                access_log=False,
                lifespan="off",
                server_header=False,
                timeout_keep_alive=75,  # above the 60 s of common proxies, which must close first
            )
        )

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def warm_up(tokenizer: Tokenizer) -> None:
    """Render a conversation, so that the first client's does not wait for the code that does."""
    try:
        tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    except QtoolError:
        pass  # a template that refuses it; clients are told what it says of theirs


async def _all_empty(services: Sequence[Service]) -> None:
    for service in services:
        await service.admission.wait_until_empty()


class ServerRun:
    """One run of a server, from a bound socket to a clean stop."""

    def __init__(
        self, service: Service, bound: socket.socket, pool: ModelPool | None = None
    ) -> None:
        """pool: further models beside the service's own, which is the pool's first."""
        self._service = service
        self._pool = pool
        self._bound = bound
        limit = service.config.max_body_bytes
        keys = service.config.api_keys
        app = create_app(service) if pool is None else PoolApp(pool, limit, keys)
        self._server = _Server(app, service.config)
        self._stop_now = asyncio.Event()
        self._stopping: asyncio.Task[None] | None = None

    async def serve(self, on_ready: Callable[[], None] = lambda: None) -> None:
        """Serve until `request_stop`. The engine runs before this begins and is stopped by it."""
        # What a conversation needs of transformers takes a second to import: now, beside the first
        # requests, and not when the first chat waits for it.
        warming = asyncio.to_thread(warm_up, self._service.tokenizer)
        beside = [asyncio.create_task(self._announce(on_ready)), asyncio.create_task(warming)]
        if self._pool is not None:
            beside.append(asyncio.create_task(self._pool.watch()))
        try:
            await self._server.serve(sockets=[self._bound])
            if self._stopping is not None:
                await self._stopping
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
            if self._pool is not None:
                await self._pool.close()

    async def _announce(self, on_ready: Callable[[], None]) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        on_ready()

    def request_stop(self) -> None:
        """First call: let running answers finish, then stop. Second call: stop now."""
        if self._stopping is None:
            self._stopping = asyncio.get_running_loop().create_task(self._stop())
        else:
            self._stop_now.set()

    async def _stop(self) -> None:
        seconds = self._service.config.shutdown_timeout
        services = [self._service] if self._pool is None else self._pool.services
        for service in services:
            service.admission.close()
        self._server.should_exit = True  # uvicorn closes the listening socket
        if num_inside := sum(service.admission.num_inside for service in services):
            logger.info("stopping: %d answers get up to %g s", num_inside, seconds)
        finished = asyncio.create_task(_all_empty(services))
        hurried = asyncio.create_task(self._stop_now.wait())
        await asyncio.wait(
            {finished, hurried}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
        )
        # What still runs ends now; its stream gets an error event, then the connection closes.
        for service in services:
            await service.client.stop(drain_seconds=0)
        for task in (finished, hurried):
            task.cancel()
        await asyncio.gather(finished, hurried, return_exceptions=True)
        connections = self._server.server_state.connections
        for _ in range(LAST_BYTES_TRIES):
            if not connections:
                return
            await asyncio.sleep(LAST_BYTES_SECONDS / LAST_BYTES_TRIES)
        for connection in list(connections):
            # A client that does not read would hold the process for ever.
            connection.transport.abort()


@contextmanager
def stop_signals(loop: asyncio.AbstractEventLoop, stop: Callable[[], None]) -> Iterator[None]:
    """Call ``stop`` on SIGTERM and Ctrl-C."""
    handled = (signal.SIGTERM, signal.SIGINT)
    try:
        for number in handled:
            loop.add_signal_handler(number, stop)
    except NotImplementedError:  # Windows
        for number in handled:
            signal.signal(number, lambda *_: loop.call_soon_threadsafe(stop))
        yield
        return
    try:
        yield
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
