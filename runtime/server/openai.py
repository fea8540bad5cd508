"""The OpenAI API: `/v1/models`, `/v1/completions` and `/v1/chat/completions`.

Bodies are read as bytes and parsed as JSON whatever their Content-Type, since `curl -d` without a
header says urlencoded. Answers are bytes made by orjson; nothing is validated on the way out.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qtool.runtime.server.chunks import EMPTY_DELTA, ROLE_DELTA, ChunkWriter, content_delta
from qtool.runtime.server.exchange import Exchange, json_response, read_body
from qtool.runtime.server.generation import Answer, Job, Piece
from qtool.runtime.server.prompts import (
    OPENAI_COMPLETION_TOKENS,
    chat_prompt,
    completion_prompts,
    num_new_tokens,
)
from qtool.runtime.server.protocol import (
    UNSUPPORTED_IN_CHAT,
    UNSUPPORTED_IN_COMPLETIONS,
    ChatBody,
    CompletionBody,
    GenerationBody,
    parse,
)
from qtool.runtime.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    async def models() -> Response:
        listed = [_model_card(service, name) for name in service.config.served_model_names]
        return json_response({"object": "list", "data": listed})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        return json_response(_model_card(service, service.model_name(name)))

    @router.post("/v1/completions", openapi_extra=_body_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        raw = await read_body(request, service.config.max_body_bytes)
        body = parse(CompletionBody, raw, UNSUPPORTED_IN_COMPLETIONS)
        return await CompletionExchange(service, body).response(request)

    @router.post("/v1/chat/completions", openapi_extra=_body_schema(ChatBody))
    async def chat_completions(request: Request) -> Response:
        raw = await read_body(request, service.config.max_body_bytes)
        body = parse(ChatBody, raw, UNSUPPORTED_IN_CHAT)
        return await ChatExchange(service, body).response(request)

    return router


def _body_schema(body_type: type[GenerationBody]) -> dict[str, Any]:
    # Only for /docs; the names are resolved by app.openapi_schema.
    schema = {"$ref": f"#/components/schemas/{body_type.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _model_card(service: Service, name: str) -> dict[str, object]:
    info = service.client.info
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qtool",
        "root": service.config.model_root,
        "parent": None,
        "max_model_len": info.max_model_len,
        "permission": [],
        "qtool": {
            "format": info.format,
            "dtype": info.dtype,
            "device": info.device,
            "chat_template": service.tokenizer.chat_template_origin,
        },
    }


class CompletionExchange(Exchange):
    id_prefix = "cmpl"
    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(self, service: Service, body: CompletionBody) -> None:
        super().__init__(service, body)
        self._completion = body

    async def jobs(self) -> list[Job]:
        body, service = self._completion, self.service
        info = service.client.info
        prompts = await completion_prompts(body, service.tokenizer, info)
        # A given max_tokens must fit behind every prompt; the default shrinks to fit.
        return [
            self.job(
                index,
                ids,
                num_new_tokens(
                    body.max_tokens, OPENAI_COMPLETION_TOKENS, len(ids), info, param="prompt"
                ),
            )
            for index, ids in enumerate(prompts)
        ]

    def choice(self, index: int, answer: Answer) -> dict[str, object]:
        return {
            "index": index,
            "text": answer.text,
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_string,
        }

    def opening(self, writer: ChunkWriter, index: int, usage: bytes | None) -> bytes:
        return b""

    def chunks(self, writer: ChunkWriter, index: int, piece: Piece, usage: bytes | None) -> bytes:
        return writer.completion(
            index,
            piece.text,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_string,
            usage=usage,
        )


class ChatExchange(Exchange):
    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, service: Service, body: ChatBody) -> None:
        super().__init__(service, body)
        self._chat = body

    async def jobs(self) -> list[Job]:
        body, service = self._chat, self.service
        ids = await chat_prompt(body, service.tokenizer)
        max_tokens = num_new_tokens(
            body.max_new_tokens,
            service.config.sampling.max_new_tokens,
            len(ids),
            service.client.info,
            param="messages",
        )
        return [self.job(0, ids, max_tokens, extra_stop=service.tokenizer.chat_stop)]

    def choice(self, index: int, answer: Answer) -> dict[str, object]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": None,
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_string,
        }

    def opening(self, writer: ChunkWriter, index: int, usage: bytes | None) -> bytes:
        return writer.chat(index, ROLE_DELTA, usage=usage)

    def chunks(self, writer: ChunkWriter, index: int, piece: Piece, usage: bytes | None) -> bytes:
        if piece.finish_reason is None:
            return writer.chat(index, content_delta(piece.text), usage=usage)
        last = writer.chat(
            index,
            EMPTY_DELTA,
            finish_reason=piece.finish_reason,
            stop_reason=piece.stop_string,
            usage=usage,
        )
        # An end-of-text token has no text of its own and needs no chunk.
        return (
            writer.chat(index, content_delta(piece.text), usage=usage) + last
            if piece.text
            else last
        )
