"""Generation for asyncio programs, under vLLM's names.

    engine = AsyncLLMEngine.from_engine_args(AsyncEngineArgs(model="builtin:books-7m"))
    async for output in engine.generate("The sea", SamplingParams(), request_id="req1"):
        print(output.outputs[0].text)          # all of the text so far

Any number of `generate` calls run at once, batched. Leaving one early (break, a cancelled task)
frees what it held. The engine belongs to the event loop that first calls `generate`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any, cast

from qtool.runtime.config import EngineConfig
from qtool.runtime.engine.async_engine import AsyncEngine, EngineStopped
from qtool.runtime.engine.client import EngineStats, ModelInfo
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest, LoRARequest, TokenOutput
from qtool.runtime.engine_args import engine_config
from qtool.runtime.loading import load_for
from qtool.runtime.outputs import Answers, RequestOutput
from qtool.runtime.requests import Prompt, prompt_ids, with_bad_words_as_ids
from qtool.runtime.tokenizer import Tokenizer


class AsyncEngineArgs:
    """What to load and how: `model`, and the fields of `EngineConfig` by name."""

    def __init__(self, model: str, **engine_args: Any) -> None:
        self.config: EngineConfig = engine_config(model, engine_args)


class AsyncLLMEngine:
    """One model, loaded when this is built."""

    def __init__(self, config: EngineConfig) -> None:
        loaded = load_for(config)
        self.config = config
        self._tokenizer = loaded.tokenizer
        self._engine = AsyncEngine.from_loaded(loaded, config)
        self._starting: asyncio.Task[None] | None = None

    @classmethod
    def from_engine_args(cls, engine_args: AsyncEngineArgs) -> AsyncLLMEngine:
        return cls(engine_args.config)

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams,
        request_id: str,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> AsyncGenerator[RequestOutput, None]:
        """The answer so far, after each step that added to it; the last has `finished`."""
        await self._started()
        text, ids = prompt_ids(prompt, self._tokenizer)
        sampling = with_bad_words_as_ids(sampling_params, self._tokenizer)
        request = GenerationRequest(request_id, ids, sampling, priority, lora=lora_request)
        answers = Answers(request, text, self._tokenizer)
        # Which of many are the best is known at the end.
        at_end_only = sampling.num_sequences > sampling.n
        # It is an async generator; the seam promises only an iterator.
        outputs = cast("AsyncGenerator[TokenOutput, None]", self._engine.generate(request))
        async with aclosing(outputs):
            async for output in outputs:
                if answers.take(output):
                    self._engine.abort(request_id, output.index)
                if answers.finished or not at_end_only:
                    yield answers.result()
                if answers.finished:
                    return

    async def abort(self, request_id: str) -> None:
        """End a request; its `generate` yields what there is, with finish_reason "abort"."""
        self._engine.abort(request_id)

    async def get_tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    @property
    def info(self) -> ModelInfo:
        return self._engine.info

    def stats(self) -> EngineStats:
        return self._engine.stats()

    async def check_health(self) -> None:
        """Raise if the engine takes no requests."""
        await self._started()
        if not self._engine.healthy():
            raise EngineStopped("the engine has ended after an error", hint="see the log")

    async def shutdown(self) -> None:
        """End what runs, and the engine."""
        if self._starting is not None:
            await self._engine.stop()

    async def _started(self) -> None:
        if self._starting is None:
            self._starting = asyncio.create_task(self._engine.start())
        await asyncio.shield(self._starting)
