"""What happens to every request before a route sees it: a request id and the API key.

Plain ASGI: a middleware made of Starlette's `BaseHTTPMiddleware` hides the client's disconnect
from the route.
"""

from __future__ import annotations

import hashlib
import hmac
import time
import uuid
from collections.abc import Iterable, Sequence

from qtool.runtime.server.asgi import App, Message, Receive, Scope, Send
from qtool.runtime.server.dialects import in_dialect
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.metrics import Metrics

# What needs no key: probes and scrapers carry none, and a page must load before it can ask for one.
OPEN_PATHS = frozenset(
    {"/health", "/ping", "/version", "/load", "/metrics", "/docs", "/openapi.json", "/favicon.ico"}
)
OPEN_PREFIXES = ("/web/",)
MAX_REQUEST_ID_BYTES = 128
METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "DELETE", "PUT", "PATCH"})


def header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    return next((value for key, value in headers if key == name), None)


class RequestIdMiddleware:
    """Answer with the client's `x-request-id`, or one made here: logs on both sides then match."""

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = header(scope["headers"], b"x-request-id")
        usable = given is not None and 0 < len(given) <= MAX_REQUEST_ID_BYTES and _printable(given)
        request_id = given if given is not None and usable else uuid.uuid4().hex.encode()

        scope["request_id"] = request_id.decode()

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-request-id", request_id)]
            await send(message)

        await self.app(scope, receive, send_with_id)


class HttpMetricsMiddleware:
    """Counts requests by route; unknown paths are one, or a scanner would make a series of each."""

    def __init__(self, app: App, metrics: Metrics) -> None:
        self.app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = time.monotonic()
        status = "5xx"
        num_bytes = 0

        async def send_and_look(message: Message) -> None:
            nonlocal status, num_bytes
            if message["type"] == "http.response.start":
                status = f"{message['status'] // 100}xx"
            num_bytes += len(message.get("body", b""))
            await send(message)

        try:
            await self.app(scope, receive, send_and_look)
        finally:
            route = scope.get("route")
            handler, method = getattr(route, "path", "none"), scope["method"]
            if method not in METHODS:
                method = "other"
            self._metrics.http_requests.labels(handler, method, status).inc()
            self._metrics.http_seconds.labels(handler, method).observe(time.monotonic() - begun)
            announced = dict(scope["headers"]).get(b"content-length", b"0")
            asked = int(announced) if announced.isdigit() else 0
            self._metrics.http_request_bytes.labels(handler).observe(asked)
            self._metrics.http_response_bytes.labels(handler).observe(num_bytes)


def _printable(value: bytes) -> bool:
    return all(0x21 <= byte <= 0x7E for byte in value)


def is_open(scope: Scope) -> bool:
    """Whether an HTTP request needs no key."""
    path = scope["path"]
    is_page = path == "/" and scope["method"] in ("GET", "HEAD")
    return is_page or path in OPEN_PATHS or path.startswith(OPEN_PREFIXES)


class ApiKeyMiddleware:
    """Keys, as `Authorization: Bearer` or, as Anthropic's clients send them, as `x-api-key`.
    Digests are compared in constant time: nothing about a key leaks.
    """

    def __init__(self, app: App, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.admits(scope):
            await self.app(scope, receive, send)
            return
        refusal = ApiError(
            401,
            "Incorrect or missing API key; send it as `Authorization: Bearer KEY`",
            type="authentication_error",
            code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )
        await in_dialect(scope["path"], refusal)(scope, receive, send)

    def admits(self, scope: Scope) -> bool:
        """Whether a request may go on; if it has a key, the scope then says which."""
        if scope["type"] != "http" or scope["method"] == "OPTIONS" or is_open(scope):
            return True
        matched = self._matched(scope["headers"])
        if matched is not None:
            scope["api_key"] = f"key {matched}"
        return matched is not None

    def _matched(self, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
        """The place in the list of the key that was sent."""
        scheme, _, key = (header(headers, b"authorization") or b"").partition(b" ")
        if scheme.lower() != b"bearer":
            key = header(headers, b"x-api-key") or b""
        given = hashlib.sha256(key.strip()).digest()
        # Every key is compared, so that the time does not tell which one matched.
        equal = [hmac.compare_digest(given, digest) for digest in self._digests]
        return equal.index(True) if any(equal) else None
