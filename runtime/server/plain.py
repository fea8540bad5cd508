"""`POST /chat?message=...`: the smallest chat there is, for a page or a shell script.

The answer is a stream of `data:` lines with nothing but its text in them. A body, if there is one,
may hold the history of the conversation and a system prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qtool.runtime.server.answers import Timing, Usage
from qtool.runtime.server.chat_exchange import ChatExchange, ChatWriter
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.errors import ApiError, invalid
from qtool.runtime.server.exchange import read_body
from qtool.runtime.server.generation import Answer, Piece
from qtool.runtime.server.message_parser import Content
from qtool.runtime.server.openai import body_schema
from qtool.runtime.server.parsing import INT32, Body, Int, parse, validated
from qtool.runtime.server.service import Service

NEW_TOKENS = 200
TEMPERATURE = 0.7


class PlainBody(Body):
    message: str | None = None
    system: str | None = None
    history: list[dict[str, Any]] | None = None
    max_new_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/chat", openapi_extra=body_schema(PlainBody))
    async def chat(request: Request, message: str | None = None) -> Response:
        raw = await read_body(request, service.config.max_body_bytes)
        body = parse(PlainBody, raw) if raw else PlainBody()
        text = message if message is not None else body.message
        if not text:
            raise invalid("`message` is required, as in POST /chat?message=Hello", param="message")
        system = [{"role": "system", "content": body.system}] if body.system else []
        question = {"role": "user", "content": text}
        fields = {
            "messages": [*system, *(body.history or ()), question],
            "max_tokens": body.max_new_tokens or NEW_TOKENS,
            "temperature": TEMPERATURE if body.temperature is None else body.temperature,
            "stream": True,
        }
        return await ChatExchange(service, validated(ChatBody, fields), PlainChat).response(request)

    return router


class PlainChat(ChatWriter):
    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        return {"response": self.message(0, answers[0]).content}

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        texts = [part.text for part in self.read(index, piece) if isinstance(part, Content)]
        return data_lines("".join(texts))

    def error(self, error: ApiError) -> bytes:
        return b"event: error\n" + data_lines(error.message)


def data_lines(text: str) -> bytes:
    """One event; a line break in its text begins another `data:` line, as the format says."""
    if not text:
        return b""
    return b"".join(b"data: %b\n" % line.encode() for line in text.split("\n")) + b"\n"
