"""One HTTP request for generated text, from its body to the last byte: what all dialects share.

A dialect (OpenAI completions, OpenAI chat, ...) says how its body becomes jobs and how pieces of
answers become JSON. Everything that must not differ between dialects is here: places in the queue
are taken before the headers go out, a client that leaves ends the work, an error after the headers
becomes an event, and every request leaves one line in the log.
"""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

import orjson
from fastapi import Request
from fastapi.responses import Response

from qtool.errors import QtoolError
from qtool.runtime.engine.sequence import GenerationRequest
from qtool.runtime.server.asgi import ClientGone, EventStream, unless_client_goes
from qtool.runtime.server.chunks import DONE, ChunkWriter, Usage, error_event
from qtool.runtime.server.errors import ApiError, internal
from qtool.runtime.server.generation import Answer, Job, Piece
from qtool.runtime.server.prompts import sampling_params
from qtool.runtime.server.protocol import GenerationBody
from qtool.runtime.server.service import Service, logger

NULL = b"null"


class Exchange(ABC):
    """One request and its answer."""

    id_prefix: str
    object_name: str
    chunk_object_name: str

    def __init__(self, service: Service, body: GenerationBody) -> None:
        self.service = service
        self.body = body
        self.arrival = time.monotonic()
        self.model = service.model_name(body.model)
        self.id = f"{self.id_prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    @abstractmethod
    async def jobs(self) -> list[Job]:
        """The sequences to generate, one for each choice; ApiError if the body cannot be served."""

    @abstractmethod
    def choice(self, index: int, answer: Answer) -> dict[str, object]:
        """One entry of `choices` in a whole answer."""

    @abstractmethod
    def opening(self, writer: ChunkWriter, index: int, usage: bytes | None) -> bytes:
        """What a stream sends for a choice before its first token; may be nothing."""

    @abstractmethod
    def chunks(self, writer: ChunkWriter, index: int, piece: Piece, usage: bytes | None) -> bytes:
        """What a stream sends for one piece."""

    async def response(self, request: Request) -> Response:
        try:
            return await self._response(request)
        except (ApiError, QtoolError, ClientGone):
            raise
        except Exception:
            # Here and not left to the framework, which would close the connection on it.
            logger.exception("%s failed", self.id)
            raise internal() from None

    async def _response(self, request: Request) -> Response:
        jobs = await self.jobs()
        if self.body.stream:
            # Places are taken before the headers are sent, so that a full queue is still a 503.
            events = self._admitted_events(jobs)
            await anext(events)
            return EventStream(
                events, keep_alive_seconds=self.service.config.sse_keep_alive_seconds
            )
        with self.service.admission.enter(len(jobs)):
            answers = await unless_client_goes(request.receive, self.service.engine.answers(jobs))
        usage = _usage(jobs)
        for answer in answers:
            usage.completion_tokens += answer.num_generated_tokens
            usage.cached_tokens += answer.num_cached_tokens
        self._log(usage, answers[0].finish_reason)
        return json_response(
            {
                **self._head(self.object_name),
                "choices": [self.choice(index, answer) for index, answer in enumerate(answers)],
                "usage": usage.as_dict(),
            }
        )

    def _head(self, object_name: str) -> dict[str, object]:
        return {
            "id": self.id,
            "object": object_name,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def job(
        self,
        index: int,
        token_ids: tuple[int, ...],
        max_tokens: int,
        *,
        extra_stop: tuple[str, ...] = (),
    ) -> Job:
        service, body = self.service, self.body
        sampling = sampling_params(
            body,
            service.config.sampling,
            service.client.info,
            max_tokens=max_tokens,
            extra_stop=extra_stop,
        )
        request = GenerationRequest(
            request_id=f"{self.id}-{index}",
            prompt_token_ids=token_ids,
            sampling=sampling,
            priority=body.priority or 0,
        )
        return Job(request, bool(body.include_stop_str_in_output), self.arrival)

    async def _admitted_events(self, jobs: Sequence[Job]) -> AsyncGenerator[bytes, None]:
        with self.service.admission.enter(len(jobs)):
            yield b""  # admitted; taken by response() before the headers
            async with aclosing(self._events(jobs)) as events:
                async for event in events:
                    yield event

    async def _events(self, jobs: Sequence[Job]) -> AsyncGenerator[bytes, None]:
        writer = ChunkWriter(self._head(self.chunk_object_name))
        usage = _usage(jobs)
        counted = [0] * len(jobs)
        every_chunk = self.body.usage_on_every_chunk
        finish_reason: str = "abort"

        def chunk_usage() -> bytes | None:
            if every_chunk:
                return orjson.dumps(usage.as_dict())
            return NULL if self.body.include_usage else None

        try:
            for index in range(len(jobs)):
                if opening := self.opening(writer, index, chunk_usage()):
                    yield opening
            async with aclosing(self.service.engine.merged(jobs)) as pieces:
                async for index, piece in pieces:
                    usage.completion_tokens += piece.num_generated_tokens - counted[index]
                    counted[index] = piece.num_generated_tokens
                    if piece.finish_reason is not None:
                        usage.cached_tokens += piece.num_cached_tokens
                        finish_reason = piece.finish_reason
                    yield self.chunks(writer, index, piece, chunk_usage())
            if self.body.include_usage:
                yield writer.usage(usage)
        except ApiError as error:
            finish_reason = error.code or "error"
            yield error_event(error)
        except Exception:
            logger.exception("%s failed", self.id)
            finish_reason = "error"
            yield error_event(internal())
        finally:
            self._log(usage, finish_reason)
        yield DONE

    def _log(self, usage: Usage, finish_reason: str) -> None:
        if not self.service.config.log_requests:
            return
        seconds = time.monotonic() - self.arrival
        logger.info(
            "%s: %d tokens in (%d cached), %d out, %.2f s, %s",
            self.id,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            seconds,
            finish_reason,
        )


def _usage(jobs: Sequence[Job]) -> Usage:
    return Usage(prompt_tokens=sum(job.num_prompt_tokens for job in jobs))


def json_response(document: dict[str, object]) -> Response:
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
