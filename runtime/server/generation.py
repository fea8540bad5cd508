"""Token ids from the engine, turned into text with stop strings, timing and a clean end.

One `Piece` for each step of the engine that gave the sequence tokens, also where the text of the
step is empty (half a character, or a possible beginning of a stop string is held back): clients
measure the time between tokens by the chunks they get, and merging would make it a lie.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from qtool.errors import QtoolError, UsageError
from qtool.runtime.engine.client import EngineClient, QueueFull
from qtool.runtime.engine.logprobs import TokenLogprobs
from qtool.runtime.engine.sequence import GenerationRequest, PromptTooLong, TokenOutput
from qtool.runtime.server.errors import (
    ApiError,
    context_length_exceeded,
    deadline_passed,
    from_qtool_error,
    too_many,
    unavailable,
)
from qtool.runtime.server.limits import Admission
from qtool.runtime.server.metrics import Metrics, SequenceTimer
from qtool.runtime.tokenizer import IncrementalDetokenizer, Tokenizer

StopReason = Literal["stop", "length"]


class Piece(NamedTuple):
    """What one step added to one answer. The last one has a `finish_reason`.

    token_ids        of the step, the one that ended the text included
    logprobs         one for each of them, where asked for
    prompt_logprobs  with the first piece, where asked for: one for each token of the prompt
    stop_reason      the stop string or stop token id that ended the text
    """

    text: str
    num_generated_tokens: int
    num_cached_tokens: int = 0
    finish_reason: StopReason | None = None
    stop_reason: str | int | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate.

    keep_special  special tokens stay in the text: marks of thoughts and calls are among them
    """

    request: GenerationRequest
    arrival: float = field(default_factory=time.monotonic)
    keep_special: bool = False

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.request.prompt_token_ids)


@dataclass(slots=True)
class Answer:
    """A whole answer: the sum of its pieces."""

    text: str = ""
    num_generated_tokens: int = 0
    num_cached_tokens: int = 0
    finish_reason: StopReason = "stop"
    stop_reason: str | int | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprobs | None, ...] = ()

    @property
    def mean_logprob(self) -> float:
        """How likely the answer is, a token; comparable between answers of different lengths."""
        values = [entry.logprob for entry in self.logprobs]
        return sum(values) / len(values) if values else float("-inf")


class TextEngine:
    """An `EngineClient` that speaks text."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer, metrics: Metrics, admission: Admission
    ) -> None:
        self.client = client
        self.tokenizer = tokenizer
        self._metrics = metrics
        self._admission = admission

    async def stream(self, job: Job) -> AsyncGenerator[Piece, None]:
        """The answer piece by piece. Closing the generator early aborts the request."""
        request = job.request
        detokenizer = IncrementalDetokenizer(
            self.tokenizer,
            request.prompt_token_ids,
            request.sampling.stop,
            request.sampling.include_stop_str_in_output,
            skip_special_tokens=request.sampling.skip_special_tokens and not job.keep_special,
        )
        timer = SequenceTimer(self._metrics, job.arrival)
        ended_as: str | None = None
        latest: TokenOutput | None = None
        try:
            async with _closing(self.client.generate(request)) as outputs:
                async for output in outputs:
                    timer.tokens(len(output.new_token_ids), time.monotonic())
                    latest = output
                    if output.finish_reason in ("abort", "timeout", "error"):
                        ended_as = output.finish_reason
                        raise _ended_early(output)
                    piece = self._piece(job, detokenizer, output)
                    if piece.finish_reason is not None:
                        ended_as = piece.finish_reason
                    yield piece
                    if piece.finish_reason is not None:
                        # Perhaps before the engine knows (a stop string): closing the iterator
                        # aborts the request and frees its blocks.
                        return
                raise ApiError(500, "The engine ended an answer early", type="server_error")
        except Exception as error:
            ended_as = ended_as or "error"
            if isinstance(error, QtoolError):
                raise _as_api_error(error) from None
            raise
        finally:
            # None: the consumer was cancelled or closed this generator.
            now = time.monotonic()
            timer.finished(ended_as or "abort", latest, now)
            self._admission.answered(now - job.arrival)

    @staticmethod
    def _piece(job: Job, detokenizer: IncrementalDetokenizer, output: TokenOutput) -> Piece:
        sampling = job.request.sampling
        token_ids = output.new_token_ids
        if output.finish_reason == "stop" and not sampling.include_stop_str_in_output:
            token_ids = token_ids[:-1]  # the id that ended the text is no part of it
        delta = detokenizer.push(token_ids)
        text = delta.text
        finish_reason: StopReason | None = None
        stop_reason: str | int | None = delta.stop
        if stop_reason is not None:
            finish_reason = "stop"
        elif output.finish_reason in ("stop", "length"):
            finish_reason = output.finish_reason
            tail = detokenizer.flush()
            text += tail.text
            if tail.stop is not None:
                finish_reason, stop_reason = "stop", tail.stop
            elif finish_reason == "stop" and output.new_token_ids[-1] in sampling.stop_token_ids:
                stop_reason = output.new_token_ids[-1]
        return Piece(
            text=text,
            num_generated_tokens=output.num_generated_tokens,
            num_cached_tokens=output.num_cached_tokens,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            token_ids=output.new_token_ids,
            logprobs=output.logprobs or (),
            prompt_logprobs=output.prompt_logprobs or (),
        )

    async def answer(self, job: Job) -> Answer:
        """The whole answer at once."""
        answer = Answer()
        texts: list[str] = []
        async with aclosing(self.stream(job)) as pieces:
            async for piece in pieces:
                texts.append(piece.text)
                answer.token_ids.extend(piece.token_ids)
                answer.logprobs.extend(piece.logprobs)
                answer.prompt_logprobs = answer.prompt_logprobs or piece.prompt_logprobs
                if piece.finish_reason is not None:
                    answer.text = "".join(texts)
                    answer.num_generated_tokens = piece.num_generated_tokens
                    answer.num_cached_tokens = piece.num_cached_tokens
                    answer.finish_reason = piece.finish_reason
                    answer.stop_reason = piece.stop_reason
                    return answer
        raise AssertionError("a stream of pieces ends with a finish reason or an error")

    async def answers(self, jobs: Sequence[Job]) -> list[Answer]:
        """All answers, in the order of the jobs; the first failure ends the others."""
        if len(jobs) == 1:
            return [await self.answer(jobs[0])]
        tasks = [asyncio.create_task(self.answer(job)) for job in jobs]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            await _cancel(tasks)

    async def merged(self, jobs: Sequence[Job]) -> AsyncGenerator[tuple[int, Piece], None]:
        """(position of the job, piece) as they come; the first failure ends all."""
        if len(jobs) == 1:
            async with aclosing(self.stream(jobs[0])) as pieces:
                async for piece in pieces:
                    yield 0, piece
            return
        arrived: asyncio.Queue[tuple[int, Piece] | BaseException] = asyncio.Queue()

        async def pump(index: int) -> None:
            try:
                async with aclosing(self.stream(jobs[index])) as pieces:
                    async for piece in pieces:
                        arrived.put_nowait((index, piece))
            except Exception as error:
                arrived.put_nowait(error)

        tasks = [asyncio.create_task(pump(index)) for index in range(len(jobs))]
        try:
            num_unfinished = len(jobs)
            while num_unfinished:
                item = await arrived.get()
                if isinstance(item, BaseException):
                    raise item
                num_unfinished -= item[1].finish_reason is not None
                yield item
        finally:
            await _cancel(tasks)


@asynccontextmanager
async def _closing(
    outputs: AsyncIterator[TokenOutput],
) -> AsyncIterator[AsyncIterator[TokenOutput]]:
    """contextlib.aclosing for what is promised to be an iterator and is mostly a generator."""
    try:
        yield outputs
    finally:
        if isinstance(outputs, AsyncGenerator):
            await outputs.aclose()


async def _cancel(tasks: Sequence[asyncio.Task[None]] | Sequence[asyncio.Task[Answer]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _as_api_error(error: QtoolError) -> ApiError:
    if isinstance(error, PromptTooLong):
        return context_length_exceeded(
            limit=error.max_model_len,
            num_prompt_tokens=error.num_prompt_tokens,
            max_tokens=None,
            param="prompt",
        )
    if isinstance(error, UsageError):
        return from_qtool_error(error)
    if isinstance(error, QueueFull):
        return too_many(error.message, code="queue_full", retry_after_seconds=1)
    # The engine has stopped or cannot go on; the request itself is not at fault.
    return unavailable(error.message, code="engine_unavailable", retry_after_seconds=5)


def _ended_early(output: TokenOutput) -> ApiError:
    if output.finish_reason == "abort":
        return unavailable(
            "The server stopped before this answer was complete",
            code="aborted",
            retry_after_seconds=5,
        )
    if output.finish_reason == "timeout":
        return deadline_passed()
    reason = output.error or "no reason given"
    return ApiError(500, f"The engine failed on this request: {reason}", type="server_error")
