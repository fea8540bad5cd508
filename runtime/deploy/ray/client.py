"""An `EngineClient` whose engines are replicas of a Ray Serve deployment.

A request that fails before its first output goes to another replica: nothing of it was seen yet.
One that fails later ends with an error, as its text cannot be gone on with.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import BackPressureError, RayServeException, RequestCancelledError

from qtool.errors import UsageError
from qtool.runtime.deploy.ray.board import REPORT_SECONDS, Snapshot
from qtool.runtime.deploy.ray.wire import Refusal, Routed, RoutedText, as_text
from qtool.runtime.engine.answers import validate
from qtool.runtime.engine.async_engine import EngineStopped
from qtool.runtime.engine.client import EngineStats, ModelInfo, QueueFull
from qtool.runtime.engine.embedding import Pooling
from qtool.runtime.engine.sequence import GenerationRequest, TokenOutput

logger = logging.getLogger("qtool.deploy.ray")

# Replicas that a request is tried on, as long as nothing came of it.
TRIES = 3


@dataclass(slots=True)
class _Running:
    """A request on its way.

    latest   of each answer, what an abort reports
    aborted  answers that nobody waits for any more
    """

    request: GenerationRequest
    response: Any = None
    latest: dict[int, TokenOutput] = field(default_factory=dict)
    ended: set[int] = field(default_factory=set)
    aborted: set[int] = field(default_factory=set)

    def unfinished(self) -> list[int]:
        return [i for i in range(self.request.sampling.num_sequences) if i not in self.ended]

    def ending(self, index: int) -> TokenOutput:
        """The last output of an aborted answer."""
        self.ended.add(index)
        latest = self.latest.get(index)
        return TokenOutput(
            self.request.request_id,
            (),
            "abort",
            len(self.request.prompt_token_ids),
            0 if latest is None else latest.num_generated_tokens,
            index=index,
        )


class RayEngines:
    """
    engines  handle of the deployment of `EngineReplica`
    board    handle of the deployment of `Board`
    """

    def __init__(
        self, engines: serve.handle.DeploymentHandle, board: serve.handle.DeploymentHandle
    ) -> None:
        self._engines = engines
        self._board = board
        self._info: ModelInfo | None = None
        self._snapshot = Snapshot()
        self._watching: asyncio.Task[None] | None = None
        self._running: dict[str, _Running] = {}
        self._accepting = False

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise RuntimeError("the engines have not been asked yet")
        return self._info

    async def start(self) -> None:
        """Wait until an engine answers; the model may have to be downloaded and loaded first."""
        self._info = await self._engines.info.remote()
        self._snapshot = Snapshot(1)  # until the board has been asked
        self._watching = asyncio.create_task(self._watch())
        self._accepting = True

    async def _watch(self) -> None:
        while True:
            try:
                self._snapshot = await self._board.snapshot.remote()
            except (RayError, RayServeException) as error:
                # What is known stays; a board that has died is started again by Ray.
                logger.warning("the engines' board does not answer: %s", _short(error))
            await asyncio.sleep(REPORT_SECONDS)

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        self._accepting = False
        with suppress(TimeoutError):
            async with asyncio.timeout(drain_seconds):
                while self._running:
                    await asyncio.sleep(0.05)
        for request_id in list(self._running):
            self.abort(request_id)
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)

    def healthy(self) -> bool:
        """Whether an engine is heard of: without one no request can be answered."""
        return self._snapshot.num_engines > 0

    def stats(self) -> EngineStats:
        """Of all engines; what waits for one of them to have room is not on any yet."""
        stats = self._snapshot.stats
        inside = sum(len(running.unfinished()) for running in self._running.values())
        waiting = max(stats.num_requests_waiting, inside - stats.num_requests_running)
        return replace(stats, num_requests_waiting=waiting)

    def abort(self, request_id: str, index: int | None = None) -> None:
        running = self._running.get(request_id)
        if running is None:
            return
        running.aborted |= set(running.unfinished() if index is None else [index])
        if running.response is not None and running.aborted >= set(running.unfinished()):
            running.response.cancel()

    async def embed(self, token_ids: tuple[int, ...], pooling: Pooling) -> list[float]:
        routed = RoutedText(as_text(token_ids), token_ids, pooling)
        try:
            answer = await self._engines.embed.remote(routed)
        except (RayError, RayServeException) as error:
            raise _stopped(error) from None
        if isinstance(answer, Refusal):
            raise answer.error()
        vector: list[float] = answer
        return vector

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        if not self._accepting:
            raise EngineStopped("the server is not taking requests")
        validate(request, self.info)
        if request.request_id in self._running:
            raise UsageError(f"request {request.request_id} is already running")
        return self._outputs(_Running(request))

    async def _outputs(self, running: _Running) -> AsyncGenerator[TokenOutput, None]:
        request_id = running.request.request_id
        self._running[request_id] = running
        try:
            for left in reversed(range(TRIES)):
                try:
                    async with aclosing(self._tried(running)) as outputs:
                        async for output in outputs:
                            yield output
                    return
                except EngineStopped as error:
                    if running.latest or left == 0:
                        raise
                    logger.warning("%s: %s; trying another engine", request_id, error.message)
        finally:
            del self._running[request_id]
            if running.response is not None and running.unfinished():
                running.response.cancel()

    async def _tried(self, running: _Running) -> AsyncGenerator[TokenOutput, None]:
        """Outputs from one replica."""
        running.response = self._engines.options(stream=True).generate.remote(
            Routed.of(running.request)
        )
        try:
            async for item in running.response:
                if isinstance(item, Refusal):
                    raise item.error()
                for index in running.aborted - running.ended:
                    yield running.ending(index)
                if item.index not in running.ended:
                    running.latest[item.index] = item
                    if item.finish_reason is not None:
                        running.ended.add(item.index)
                    yield item
                if not running.unfinished():
                    return
        except BackPressureError as error:
            inside, limit = error.args[:2]
            raise QueueFull(inside, limit) from None
        except RequestCancelledError:
            # By `abort`; anybody else's cancelling closes this generator.
            for index in running.unfinished():
                yield running.ending(index)
        except (RayError, RayServeException) as error:
            raise _stopped(error) from None
        if running.unfinished():
            raise EngineStopped("an engine has ended an answer early", hint="send it again")


def _stopped(error: Exception) -> EngineStopped:
    return EngineStopped(
        f"the engine that was answering is gone: {_short(error)}",
        hint="send the request again; another engine takes it",
    )


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]:.200}"
