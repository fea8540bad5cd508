"""Several models behind one address: loaded on their first use, unloaded when they are idle.

    POST with "model": "b"  ->  is b loaded?  no: unload those unused longest until it fits, load b
                            ->  b's own application answers

What fits is a number of models, and a number of bytes for their weights and caches together where
one is given; where none is, the memory that is free. Each model is a whole server of its own inside
(engine, queue, metrics), so nothing of one can disturb another; this file only decides which are
here. The first model stays: it is what requests without a model mean. A model in use is never
unloaded. `keep_alive` in a request, as Ollama's clients send it, says how long its model stays
after it: seconds, "5m", 0 for not at all, -1 for ever. Names made from a model (`made_models.py`)
are answered by it.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson
from fastapi.responses import Response

from qtool.errors import QtoolError
from qtool.runtime.memory import NotEnoughMemory
from qtool.runtime.server.asgi import App, Message, Receive, Scope, Send
from qtool.runtime.server.errors import ApiError, from_qtool_error, unavailable
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.metrics import expose_together
from qtool.runtime.server.middleware import ApiKeyMiddleware, header, is_open
from qtool.runtime.server.ollama_answers import running_models
from qtool.runtime.server.service import Service, logger

LOOK_SECONDS = 1.0
BUSY_TRIES = 600
_DURATION = re.compile(r"(-?\d+(?:\.\d+)?)(ms|s|m|h)?")
_UNITS = {"ms": 0.001, "s": 1.0, None: 1.0, "m": 60.0, "h": 3600.0}


@dataclass(slots=True, eq=False)
class Hosted:
    """A loaded model. keep_seconds: how long it stays unused; None: for ever."""

    service: Service
    app: App
    keep_seconds: float | None
    last_used: float = field(default_factory=time.monotonic)
    num_users: int = 0

    def expires_at(self) -> float | None:
        """Seconds since 1970; None: never, as it stands."""
        if self.keep_seconds is None:
            return None
        return time.time() + self.keep_seconds - (time.monotonic() - self.last_used)

    def expires(self, now: float) -> bool:
        idle = self.num_users == 0 and self.keep_seconds is not None
        return idle and now - self.last_used >= (self.keep_seconds or 0.0)


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """
    models        at once, the first among them
    total_bytes   of weights and KV caches of all of them; None: what the machine has
    keep_seconds  how long a model stays unused, where a request says nothing; None: for ever
    """

    models: int = 3
    total_bytes: int | None = None
    keep_seconds: float | None = 300.0


def bytes_of(hosted: Hosted) -> int:
    info = hosted.service.client.info
    return info.weight_bytes + info.kv_cache_bytes


def keep_alive_seconds(value: object, default: float | None) -> float | None:
    """Ollama's `keep_alive`; what cannot be read is not worth refusing a request for."""
    if isinstance(value, str) and (found := _DURATION.fullmatch(value.strip())):
        value = float(found[1]) * _UNITS[found[2]]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return default
    return None if value < 0 else float(value)


class ModelPool:
    """
    first   the model that stays
    others  what requests call a model -> the model that is loaded for it
    load    makes a running service of a model, within so many bytes if a number is given; raises
            NotEnoughMemory where it does not fit
    """

    def __init__(
        self,
        first: Hosted,
        others: Callable[[str], str | None],
        load: Callable[[str, int | None], Awaitable[Hosted]],
        limits: PoolLimits,
    ) -> None:
        self.first = first
        self._others = others
        self._load = load
        self._limits = limits
        self._loaded: dict[str, Hosted] = {}
        self._loading = asyncio.Lock()

    @property
    def keep_seconds(self) -> float | None:
        return self._limits.keep_seconds

    @property
    def hosted(self) -> list[Hosted]:
        return [self.first, *self._loaded.values()]

    @property
    def services(self) -> list[Service]:
        return [hosted.service for hosted in self.hosted]

    @property
    def loaded_names(self) -> list[str]:
        return list(self._loaded)

    def knows(self, name: object) -> str | None:
        """The model that a request's word for it means, if it is not the first."""
        return self._others(name.removesuffix(":latest")) if isinstance(name, str) else None

    async def take(self, name: str | None) -> Hosted:
        """A loaded model, in use until it is given back."""
        if name is None:
            return self._used(self.first)
        if self._answers(name):
            return self._used(self._loaded[name])
        async with self._loading:
            if not self._answers(name):
                await self._unload(name)  # if its engine has failed
                begun = time.monotonic()
                self._loaded[name] = await self._load_into_room(name)
                logger.info("%s is loaded, %.1f s", name, time.monotonic() - begun)
            return self._used(self._loaded[name])

    def _answers(self, name: str) -> bool:
        return name in self._loaded and self._loaded[name].service.client.healthy()

    @staticmethod
    def _used(hosted: Hosted) -> Hosted:
        hosted.num_users += 1
        return hosted

    @staticmethod
    def give_back(hosted: Hosted) -> None:
        hosted.num_users -= 1
        hosted.last_used = time.monotonic()

    async def _load_into_room(self, name: str) -> Hosted:
        while len(self._loaded) + 1 >= max(self._limits.models, 2):
            await self._unload_one()
        while True:
            total = self._limits.total_bytes
            room = None if total is None else total - sum(map(bytes_of, self.hosted))
            try:
                return await self._load(name, room)
            except NotEnoughMemory:
                if not self._loaded:
                    raise  # nothing can make room for it
            await self._unload_one()

    async def _unload_one(self) -> None:
        """The one unused longest, as soon as there is one that nobody uses."""
        for _ in range(BUSY_TRIES):
            idle = [name for name, hosted in self._loaded.items() if hosted.num_users == 0]
            if idle:
                await self._unload(min(idle, key=lambda name: self._loaded[name].last_used))
                return
            await asyncio.sleep(0.1)
        raise unavailable(
            "All places for models are taken by models in use",
            code="no_room_for_model",
            retry_after_seconds=10,
        )

    async def unload_expired(self) -> None:
        now = time.monotonic()
        for name, hosted in list(self._loaded.items()):
            # While one is unloaded, another request may unload the next, or load it anew.
            if hosted.expires(now) and self._loaded.get(name) is hosted:
                await self._unload(name)

    async def _unload(self, name: str) -> None:
        hosted = self._loaded.pop(name, None)
        if hosted is not None:
            await hosted.service.client.stop()
            logger.info("%s is unloaded", name)

    async def watch(self) -> None:
        """Unload what nobody has used for long enough, until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            await self.unload_expired()

    async def close(self) -> None:
        for name in list(self._loaded):
            await self._unload(name)


class PoolApp:
    """Sends each request to the application of the model that it names."""

    def __init__(self, pool: ModelPool, max_body_bytes: int, api_keys: Sequence[str] = ()) -> None:
        self._pool = pool
        self._max_body_bytes = max_body_bytes
        self._keys = ApiKeyMiddleware(pool.first.app, api_keys) if api_keys else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._keys is not None and not self._keys.admits(scope):
            # Refused there, with all the headers of an answer; above all, nothing is loaded for it.
            await self._pool.first.app(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == "/metrics":
            accept = header(scope["headers"], b"accept") or b""
            metrics = [service.metrics for service in self._pool.services]
            exposition = expose_together(metrics, accept.decode("latin-1"))
            headers = {"Content-Type": exposition.content_type}
            await Response(exposition.body, headers=headers)(scope, receive, send)
            return
        if scope["type"] == "http" and scope["path"] == "/api/ps":
            loaded = self._pool.hosted
            answer = running_models((each.service, each.expires_at()) for each in loaded)
            await json_response(answer)(scope, receive, send)
            return
        if scope["type"] != "http" or scope["method"] != "POST" or is_open(scope):
            # What needs no key must load nothing either.
            await self._pool.first.app(scope, receive, send)
            return
        messages, body = await self._body(receive)
        try:
            hosted = await self._pool.take(self._pool.knows(body.get("model", body.get("name"))))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        except QtoolError as error:
            await from_qtool_error(error).response()(scope, receive, send)
            return
        if "keep_alive" in body and hosted is not self._pool.first:
            default = self._pool.keep_seconds
            hosted.keep_seconds = keep_alive_seconds(body["keep_alive"], default)
        try:
            await hosted.app(scope, _replayed(messages, receive), send)
        finally:
            self._pool.give_back(hosted)

    async def _body(self, receive: Receive) -> tuple[list[Message], dict[str, Any]]:
        """The request's messages so far, and its JSON; whose mistakes the application tells."""
        messages: list[Message] = []
        size = 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            # Too much is passed on as it came: the application refuses it.
            if not message.get("more_body") or size > self._max_body_bytes:
                break
        if size > self._max_body_bytes:
            return messages, {}
        try:
            body = orjson.loads(b"".join(message.get("body", b"") for message in messages))
        except orjson.JSONDecodeError:
            body = None
        return messages, body if isinstance(body, dict) else {}


def _replayed(messages: list[Message], receive: Receive) -> Receive:
    waiting = list(messages)

    async def replay() -> Message:
        return waiting.pop(0) if waiting else await receive()

    return replay
