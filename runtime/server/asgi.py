"""The types of the ASGI protocol (asgi.readthedocs.io), and answers that notice when the client
has gone.

A client that hangs up costs a running sequence and its KV blocks until somebody notices.
Starlette's own streaming response notices while it sends; a prefill can be silent for seconds, so
both kinds of answer here listen for the disconnect all the time and cancel the work at once.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, MutableMapping
from contextlib import aclosing
from typing import Any, TypeVar

from fastapi.responses import StreamingResponse

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

T = TypeVar("T")

KEEP_ALIVE_COMMENT = b": keep-alive\n\n"
STREAM_HEADERS = {
    # nginx and its kin hold a response back until it is whole unless they are told not to.
    "Cache-Control": "no-cache",
    "X-Accel-Buffering": "no",
}


class ClientGone(Exception):
    """The client closed the connection before its answer was complete."""


async def _disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_client_goes(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of ``work``; cancelled, with ClientGone, as soon as the client disconnects."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events, each sent at once. The generator is closed when the client goes."""

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        *,
        media_type: str = "text/event-stream",
        keep_alive_seconds: float = 0,
        write_seconds: float | None = None,
    ) -> None:
        super().__init__(events, media_type=media_type, headers=STREAM_HEADERS)
        self._write_seconds = write_seconds
        # Only server-sent events have comments; a line of NDJSON must be an answer.
        keeps_alive = keep_alive_seconds and media_type == "text/event-stream"
        self._events = with_keep_alive(events, keep_alive_seconds) if keeps_alive else events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Closed here and not in _send_all, which may be cancelled before it has begun.
        async with aclosing(self._events):
            try:
                await unless_client_goes(receive, self._send_all(send))
            except (ClientGone, TimeoutError):
                return  # gone, or as good as gone: it does not read

    async def _send_all(self, send: Send) -> None:
        await send(
            {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
        )
        async for event in self._events:
            # Waits only while the socket and uvicorn's buffer are full.
            async with asyncio.timeout(self._write_seconds):
                await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def with_keep_alive(
    events: AsyncGenerator[bytes, None], seconds: float
) -> AsyncGenerator[bytes, None]:
    """The same events, with a comment (which clients skip) wherever nothing came for so long."""
    async with aclosing(events):
        while True:
            # A task, since a timeout on anext() itself would cancel the generator.
            following = asyncio.ensure_future(anext(events))
            try:
                while not following.done():
                    await asyncio.wait({following}, timeout=seconds)
                    if not following.done():
                        yield KEEP_ALIVE_COMMENT
                try:
                    event = following.result()
                except StopAsyncIteration:
                    return
            finally:
                if not following.done():
                    following.cancel()
                    await asyncio.gather(following, return_exceptions=True)
            yield event
