"""The engine in a thread of its own, and the asyncio side that talks to it.

    asyncio thread                              engine thread, the only one that runs torch
    generate, abort --- inbox (SimpleQueue) --> add, abort, step, step, ...
    queue a request <-- call_soon_threadsafe -- all outputs of a step, handed over once

With nothing to do the engine thread blocks on its inbox and uses no CPU. Between steps it empties
the inbox without waiting, so an abort takes effect after at most one step.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue

from qtool.errors import QtoolError, UsageError
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.answers import validate
from qtool.runtime.engine.client import EngineLost, EngineStats, ModelInfo, QueueFull
from qtool.runtime.engine.embedding import Pooling
from qtool.runtime.engine.engine import Engine
from qtool.runtime.engine.grammar import GrammarCompiler
from qtool.runtime.engine.sequence import GenerationRequest, TokenOutput
from qtool.runtime.loading import LoadedModel, load_for

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Add:
    request: GenerationRequest


@dataclass(frozen=True, slots=True)
class _Abort:
    request_id: str
    index: int | None


@dataclass(frozen=True, slots=True)
class _Embed:
    token_ids: tuple[int, ...]
    pooling: Pooling
    vector: Future[list[float]]


@dataclass(frozen=True, slots=True)
class _Stop:
    """End every request and the thread."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """What the engine runs on is gone."""

    error: EngineLost


_Message = _Add | _Abort | _Embed | _Stop | _Lost


class EngineStopped(QtoolError):
    """The engine takes no more requests."""


@dataclass(frozen=True, slots=True)
class _Stream:
    request: GenerationRequest
    queue: asyncio.Queue[TokenOutput]


class AsyncEngine:
    """An `EngineClient` whose model runs in this process.

    `start` loads the model in the engine thread, unless it was given loaded; all methods but
    `stats` and `healthy` belong to the event loop that called `start`.

    failure  what the engine ended with, if it has ended by itself
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._load: Callable[[], LoadedModel] = lambda: load_for(config)
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._outputs: dict[str, _Stream] = {}
        self._num_inside = 0
        self._max_inside = config.max_num_seqs + config.num_waiting_limit
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._nothing_running = asyncio.Event()
        self._nothing_running.set()
        self._accepting = False
        self._info: ModelInfo | None = None
        self._grammars: GrammarCompiler | None = None
        self._stats = EngineStats()
        self._ended = asyncio.Event()
        self.failure: QtoolError | None = None

    @classmethod
    def from_loaded(cls, loaded: LoadedModel, config: EngineConfig) -> "AsyncEngine":
        engine = cls(config)
        engine._load = lambda: loaded
        return engine

    @property
    def info(self) -> ModelInfo:
        if self._info is None:
            raise RuntimeError("the engine has not been started")
        return self._info

    def stats(self) -> EngineStats:
        return self._stats

    def healthy(self) -> bool:
        if self._info is None or self._thread is None or self.failure is not None:
            return False
        return self._thread.is_alive()

    async def wait_until_failed(self) -> QtoolError:
        """The failure, once there is one; stopping is none."""
        await self._ended.wait()
        assert self.failure is not None
        return self.failure

    async def start(self) -> None:
        """Load the model and wait until it can run; raises what loading raises."""
        if self._thread is not None:
            raise RuntimeError("the engine has been started before")
        self._loop = asyncio.get_running_loop()
        ready: Future[ModelInfo] = Future()
        self._thread = threading.Thread(
            target=self._run, args=(ready,), name="qtool-engine", daemon=True
        )
        self._thread.start()
        self._info = await asyncio.wrap_future(ready)
        self._accepting = True

    async def stop(self, *, drain_seconds: float = 0.0) -> None:
        self._accepting = False
        if self._thread is None:
            return
        if drain_seconds > 0:
            try:
                async with asyncio.timeout(drain_seconds):
                    await self._nothing_running.wait()
            except TimeoutError:
                logger.warning("%d requests are still running and end now", len(self._outputs))
        self._inbox.put(_Stop())
        await asyncio.to_thread(self._thread.join)

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        """See `EngineClient.generate`; a request that can never run is refused by this call."""
        self._check_alive()
        validate(request, self.info)
        if request.request_id in self._outputs:
            raise UsageError(f"request {request.request_id} is already running")
        self._check_room(request)
        return self._stream(request)

    def _check_alive(self) -> None:
        if not self._accepting:
            raise EngineStopped("the engine is not taking requests")
        if not self.healthy():
            reason = "" if self.failure is None else f": {self.failure.message}"
            raise EngineStopped(f"the engine has ended after an error{reason}", hint="see the log")

    def _check_room(self, request: GenerationRequest) -> None:
        # An empty engine takes whatever one request asks for.
        if self._num_inside and self._num_inside + _num_sequences(request) > self._max_inside:
            raise QueueFull(self._num_inside, self._max_inside)

    async def _stream(self, request: GenerationRequest) -> AsyncIterator[TokenOutput]:
        wanted = request.sampling.structured_outputs
        if wanted is not None and self._grammars is not None:
            # Not in the engine's thread, where everybody would wait for it.
            await asyncio.to_thread(self._grammars.check, wanted)
        # Since the call others may have come, and the engine may have ended or been told to.
        self._check_room(request)
        self._check_alive()
        queue: asyncio.Queue[TokenOutput] = asyncio.Queue()
        self._outputs[request.request_id] = _Stream(request, queue)
        self._num_inside += _num_sequences(request)
        self._nothing_running.clear()
        self._inbox.put(_Add(request))
        num_unfinished = request.sampling.num_sequences
        try:
            while num_unfinished:
                output = await queue.get()
                num_unfinished -= output.finish_reason is not None
                if not num_unfinished:
                    self._forget(request)
                yield output
        finally:
            if num_unfinished:
                self._forget(request)
                self.abort(request.request_id)

    async def embed(self, token_ids: tuple[int, ...], pooling: Pooling) -> list[float]:
        """A vector for a text, computed between two steps."""
        self._check_alive()
        vector: Future[list[float]] = Future()
        self._inbox.put(_Embed(token_ids, pooling, vector))
        return await asyncio.wrap_future(vector)

    def abort(self, request_id: str, index: int | None = None) -> None:
        self._inbox.put(_Abort(request_id, index))

    def _forget(self, request: GenerationRequest) -> None:
        if self._outputs.pop(request.request_id, None) is not None:
            self._num_inside -= _num_sequences(request)
        if not self._outputs:
            self._nothing_running.set()

    def _deliver(self, outputs: list[TokenOutput]) -> None:
        for output in outputs:
            stream = self._outputs.get(output.request_id)
            if stream is not None:
                stream.queue.put_nowait(output)

    def _end_all(self, error: QtoolError) -> None:
        """The engine thread reads no more messages: answer those, and who else waits."""
        self._ended.set()
        for stream in self._outputs.values():
            for output in _failed(stream.request, error):
                stream.queue.put_nowait(output)
        for message in self._messages(wait=False):
            if isinstance(message, _Embed) and message.vector.set_running_or_notify_cancel():
                message.vector.set_exception(error)

    # What follows runs in the engine thread.

    def _run(self, ready: Future[ModelInfo]) -> None:
        loaded: LoadedModel | None = None
        try:
            loaded = self._load()
            engine = Engine(loaded, self._config)
        except BaseException as error:
            if loaded is not None:
                loaded.close()
            ready.set_exception(error)
            return
        self._grammars = engine.grammars
        ready.set_result(engine.info)
        if loaded.team is not None:
            loaded.team.on_lost(lambda error: self._inbox.put(_Lost(error)))
        try:
            while self._turn(engine):
                pass
        except EngineLost as error:
            logger.error("%s", error.message)
            self._fail(engine, error)
        except BaseException:
            # Not a request's failure but the engine's own: nobody may wait for it forever.
            logger.exception("the engine has failed and ends")
            self._fail(engine, QtoolError("the engine has failed; see its log"))
        finally:
            engine.close()

    def _fail(self, engine: Engine, error: QtoolError) -> None:
        self.failure = error
        self._hand_over(engine, engine.abort_all(error.message))
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._end_all, error)

    def _turn(self, engine: Engine) -> bool:
        """Take the messages, run one step, hand over what came of both; False when told to stop."""
        outputs: list[TokenOutput] = []
        going_on = True
        for message in self._messages(wait=not engine.has_work):
            if isinstance(message, _Add):
                outputs.extend(self._add(engine, message.request))
            elif isinstance(message, _Abort):
                outputs.extend(engine.abort(message.request_id, message.index))
            elif isinstance(message, _Embed):
                self._embed(engine, message)
            elif isinstance(message, _Lost):
                raise message.error
            else:
                going_on = False
        outputs.extend(engine.step() if going_on else engine.abort_all())
        self._hand_over(engine, outputs)
        return going_on

    def _add(self, engine: Engine, request: GenerationRequest) -> list[TokenOutput]:
        try:
            engine.add(request)
        except QtoolError as error:
            return _failed(request, error)
        return []

    @staticmethod
    def _embed(engine: Engine, message: _Embed) -> None:
        if not message.vector.set_running_or_notify_cancel():
            return  # the client has gone while it waited
        try:
            message.vector.set_result(engine.embed(message.token_ids, message.pooling))
        except Exception as error:
            message.vector.set_exception(error)

    def _messages(self, *, wait: bool) -> list[_Message]:
        messages: list[_Message] = []
        if wait:
            messages.append(self._inbox.get())
        while True:
            try:
                messages.append(self._inbox.get_nowait())
            except Empty:
                return messages

    def _hand_over(self, engine: Engine, outputs: list[TokenOutput]) -> None:
        self._stats = engine.stats()
        if not outputs or self._loop is None or self._loop.is_closed():
            return
        self._loop.call_soon_threadsafe(self._deliver, outputs)


def _failed(request: GenerationRequest, error: QtoolError) -> list[TokenOutput]:
    """The last outputs of a request that the engine does not have."""
    num_prompt_tokens = len(request.prompt_token_ids)
    failed = TokenOutput(request.request_id, (), "error", num_prompt_tokens, 0, error=error.message)
    return [replace(failed, index=index) for index in range(_num_sequences(request))]


def _num_sequences(request: GenerationRequest) -> int:
    return request.sampling.num_sequences
