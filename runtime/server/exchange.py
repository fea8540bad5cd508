"""One HTTP request for generated text, from its body to the last byte: what all dialects share.

A dialect says what is to be generated (an `Exchange`: `completions.py`, `chat_exchange.py`) and how
it is written (an `AnswerWriter`). Everything that must not differ between dialects is here: places
in the queue are taken before the headers go out, a client that leaves ends the work, an error
after the headers becomes an event, and every request leaves one line in the log.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace

import orjson
from fastapi import Request
from fastapi.responses import Response

from qtool.errors import QtoolError
from qtool.runtime.engine.sampling_params import SamplingParams
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.server.answers import AnswerWriter, Head, Timing, Usage
from qtool.runtime.server.asgi import ClientGone, EventStream, unless_client_goes
from qtool.runtime.server.errors import ApiError, internal
from qtool.runtime.server.generation import Answer, Job
from qtool.runtime.server.limits import client_of
from qtool.runtime.server.protocol import GenerationBody, TokenIds
from qtool.runtime.server.service import Service, logger


class Exchange(ABC):
    """One request and its answer."""

    id_prefix: str

    def __init__(self, service: Service, body: GenerationBody) -> None:
        self.service = service = service.named(body.model)
        self.body = body
        self.arrival = time.monotonic()
        model = service.model_name(body.model)
        self.head = Head(f"{self.id_prefix}-{uuid.uuid4().hex}", model, int(time.time()))
        self.num_prompt_tokens = 0
        self.request_id = ""
        self._first_token: float | None = None

    @abstractmethod
    async def prepare(self) -> tuple[list[Job], AnswerWriter]:
        """The sequences to generate, one for each choice, and who writes them down; ApiError if
        the body cannot be served.
        """

    def chosen(self, answers: list[Answer]) -> list[Answer]:
        """Of all that was generated, what is sent."""
        return answers

    async def response(self, request: Request) -> Response:
        self.request_id = request.scope.get("request_id", "")
        try:
            return await self._response(request)
        except (ApiError, QtoolError, ClientGone):
            raise
        except Exception:
            # Here and not left to the framework, which would close the connection on it.
            logger.exception("%s failed", self.head.id)
            raise internal() from None

    async def _response(self, request: Request) -> Response:
        jobs, writer = await self.prepare()
        self.service.metrics.asked(len(jobs), jobs[0].request.sampling.max_tokens or 0)
        if self.body.stream:
            # Places are taken before the headers are sent, so that a full queue is still a 429.
            events = self._admitted_events(jobs, writer, client_of(request.scope))
            await anext(events)
            return EventStream(
                events,
                media_type=writer.media_type,
                keep_alive_seconds=self.service.config.sse_keep_alive_seconds,
                write_seconds=self.service.config.write_timeout,
            )
        with self.service.admission.enter(len(jobs), client_of(request.scope)):
            answers = await unless_client_goes(request.receive, self.service.engine.answers(jobs))
        usage = Usage(self.num_prompt_tokens)
        for answer in answers:
            usage.completion_tokens += answer.num_generated_tokens
        # Answers to one prompt share what was cached of it.
        usage.cached_tokens = _cached(jobs, [answer.num_cached_tokens for answer in answers])
        self._log(usage, answers[0].finish_reason)
        return json_response(writer.document(self.chosen(answers), usage, self._timing()))

    def jobs_for(
        self,
        token_ids: TokenIds,
        sampling: SamplingParams,
        count: int,
        *,
        first_index: int = 0,
        keep_special: bool = False,
    ) -> list[Job]:
        """``count`` answers to one prompt. Seeds differ, or they would all be the same."""
        body = self.body
        self.num_prompt_tokens += len(token_ids)
        seconds = body.timeout or self.service.config.request_timeout
        jobs = []
        for choice in range(count):
            seed = sampling.seed
            request = GenerationRequest(
                request_id=f"{self.head.id}-{first_index + choice}",
                prompt_token_ids=token_ids,
                sampling=replace(sampling, seed=None if seed is None else seed + choice),
                priority=body.priority or 0,
                cache_salt=body.cache_salt,
                timeout=seconds or None,
                lora=self.service.adapter(self.head.model),
            )
            jobs.append(Job(request, self.arrival, keep_special))
        return jobs

    async def _admitted_events(
        self, jobs: Sequence[Job], writer: AnswerWriter, client: str
    ) -> AsyncGenerator[bytes, None]:
        with self.service.admission.enter(len(jobs), client):
            yield b""  # admitted; taken by response() before the headers
            async with aclosing(self._events(jobs, writer)) as events:
                async for event in events:
                    yield event

    async def _events(
        self, jobs: Sequence[Job], writer: AnswerWriter
    ) -> AsyncGenerator[bytes, None]:
        usage = Usage(self.num_prompt_tokens)
        counted, cached = [0] * len(jobs), [0] * len(jobs)
        finish_reason: str = "abort"
        try:
            if opening := writer.opening(usage):
                yield opening
            async with aclosing(self.service.engine.merged(jobs)) as pieces:
                async for index, piece in pieces:
                    self._first_token = self._first_token or time.monotonic()
                    usage.completion_tokens += piece.num_generated_tokens - counted[index]
                    counted[index] = piece.num_generated_tokens
                    cached[index] = piece.num_cached_tokens
                    if piece.finish_reason is not None:
                        usage.cached_tokens = _cached(jobs, cached)
                        finish_reason = piece.finish_reason
                    if event := writer.piece(index, piece, usage):
                        yield event
            if closing := writer.closing(usage, self._timing()):
                yield closing
        except ApiError as error:
            finish_reason = error.code or "error"
            yield writer.error(error)
        except Exception:
            logger.exception("%s failed", self.head.id)
            finish_reason = "error"
            yield writer.error(internal())
        finally:
            self._log(usage, finish_reason)

    def _timing(self) -> Timing:
        now = time.monotonic()
        return Timing(now - self.arrival, (self._first_token or now) - self.arrival)

    def _log(self, usage: Usage, finish_reason: str) -> None:
        if not self.service.config.log_requests:
            return
        seconds = time.monotonic() - self.arrival
        logger.info(
            "%s: %d tokens in (%d cached), %d out, %.2f s, %s",
            self.head.id,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            seconds,
            finish_reason,
            extra={
                "fields": {
                    "request_id": self.request_id,
                    "id": self.head.id,
                    "model": self.head.model,
                    "prompt_tokens": usage.prompt_tokens,
                    "cached_tokens": usage.cached_tokens,
                    "completion_tokens": usage.completion_tokens,
                    "seconds": round(seconds, 4),
                    "seconds_to_first_token": round(self._timing().to_first_token, 4),
                    "finish_reason": finish_reason,
                }
            },
        )


def _cached(jobs: Sequence[Job], cached: Sequence[int]) -> int:
    """Cached tokens over all prompts; of several answers to one prompt the first counts."""
    seen: dict[int, int] = {}
    for job, count in zip(jobs, cached, strict=True):
        seen.setdefault(id(job.request.prompt_token_ids), count)
    return sum(seen.values())


def json_response(document: Mapping[str, object]) -> Response:
    return Response(orjson.dumps(document), media_type="application/json")


async def read_body(request: Request, limit: int) -> bytes:
    """The body, refused with 413 as soon as it is known to be above the limit."""

    def too_large() -> ApiError:
        return ApiError(413, f"The request body is larger than {limit} bytes")

    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit:
        raise too_large()
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size > limit:
            raise too_large()
        parts.append(part)
    return b"".join(parts)
