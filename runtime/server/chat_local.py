"""Chat with a model in this process: the server's own path from messages to text, without HTTP.

The engine's hand-off needs an event loop; it runs in a thread beside the terminal's blocking reads.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Generator, Mapping, Sequence
from contextlib import aclosing
from typing import Any, TypeVar

import orjson

from qtool.errors import QtoolError
from qtool.progress import bar
from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine
from qtool.runtime.loading import LoadedModel
from qtool.runtime.modelfile import Modelfile
from qtool.runtime.server.chat_backends import AnswerEnd, Message, Stopwatch
from qtool.runtime.server.chat_exchange import ChatExchange, ChatWriter
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.chat_templates import find_chat_template
from qtool.runtime.server.config import ServerConfig
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.generation import Piece
from qtool.runtime.server.launch import (
    announce_template,
    generation_config,
    load,
    sampling_defaults,
)
from qtool.runtime.server.made_models import as_made
from qtool.runtime.server.message_parser import Content, Reasoning
from qtool.runtime.server.parsing import parse
from qtool.runtime.server.service import Service

T = TypeVar("T")

TEXTS = (Content, Reasoning)  # thoughts are shown in a terminal, as they pass


class LocalChat:
    def __init__(self, config: EngineConfig, modelfile: Modelfile | None = None) -> None:
        self._modelfile = modelfile or Modelfile(config.model)
        with bar(f"Loading {config.model}"):
            loaded = load(config)
        if self._modelfile.template is not None:
            assert loaded.tokenizer is not None
            loaded.tokenizer.use_chat_template(find_chat_template(self._modelfile.template))
        announce_template(loaded)
        self.name = config.model
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        try:
            self._service = self._run(self._start(loaded, config))
        except BaseException:
            self._stop_loop()
            raise

    async def _start(self, loaded: LoadedModel, config: EngineConfig) -> Service:
        client = AsyncEngine.from_loaded(loaded, config)
        await client.start()
        assert loaded.tokenizer is not None  # load() refuses models without one
        made = self._modelfile
        defaults = sampling_defaults(generation_config(loaded.source))
        plain = ServerConfig((config.model,), sampling=defaults, log_requests=False)
        server = as_made(plain, config.model, made)
        return Service.build(client, loaded.tokenizer, server)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def answer(
        self, messages: Sequence[Message], sampling: Mapping[str, Any]
    ) -> Generator[str | AnswerEnd, None, None]:
        arrived: queue.SimpleQueue[tuple[str, Piece] | Exception] = queue.SimpleQueue()
        watch = Stopwatch()
        body = orjson.dumps({**sampling, "messages": list(messages)})
        num_prompt_tokens = 0

        async def generate() -> None:
            nonlocal num_prompt_tokens
            try:
                parsed = parse(ChatBody, body)
                [job], writer = await ChatExchange(self._service, parsed).prepare()
                assert isinstance(writer, ChatWriter)
                num_prompt_tokens = job.num_prompt_tokens
                async with aclosing(self._service.engine.stream(job)) as pieces:
                    async for piece in pieces:
                        parts = writer.read(0, piece)
                        texts = [part.text for part in parts if isinstance(part, TEXTS)]
                        arrived.put(("".join(texts), piece))
            except Exception as error:
                arrived.put(error)

        running = asyncio.run_coroutine_threadsafe(generate(), self._loop)
        try:
            while True:
                item = arrived.get()
                if isinstance(item, ApiError):
                    raise QtoolError(item.message)
                if isinstance(item, Exception):
                    raise item
                text, piece = item
                if text:
                    watch.text_came()
                    yield text
                if piece.finish_reason is not None:
                    yield watch.end(
                        piece.finish_reason, num_prompt_tokens, piece.num_generated_tokens
                    )
                    return
        finally:
            running.cancel()

    def close(self) -> None:
        self._run(self._service.client.stop())
        self._stop_loop()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
