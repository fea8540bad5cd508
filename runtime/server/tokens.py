"""`/tokenize`, `/detokenize` and `/tokenizer_info`: the model's tokenizer over HTTP.

With these three a harness such as lm-eval can score the model without having its tokenizer. The
names of fields are vLLM's; llama.cpp's `content` and TGI's `inputs` are understood as well.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import model_validator

from qtool.runtime.server.chat_prompt import prepare_chat
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.errors import invalid
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.parsing import Body, Int, validated
from qtool.runtime.server.prompts import encode
from qtool.runtime.server.service import Service

CHAT_FIELDS = ("tools", "chat_template_kwargs", "add_generation_prompt", "continue_final_message")


class TokenizeBody(Body):
    model: str | None = None
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None
    tools: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _other_names(cls, document: Any) -> Any:
        if isinstance(document, dict) and document.get("prompt") is None:
            text = document.get("content", document.get("inputs"))
            document = {**document, "prompt": text}
        return document

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeBody:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt or `messages` must be given, one of the two")
        return self


class DetokenizeBody(Body):
    model: str | None = None
    tokens: list[Int]


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/tokenize", openapi_extra=body_schema(TokenizeBody))
    async def tokenize(request: Request) -> Response:
        body = await parsed_body(service, TokenizeBody, request)
        view = service.named(body.model)
        view.model_name(body.model)
        if body.prompt is not None:
            special = body.add_special_tokens is not False
            ids = await encode(service.tokenizer, body.prompt, add_special_tokens=special)
        else:
            fields = {name: getattr(body, name) for name in ("messages", *CHAT_FIELDS)}
            special = bool(body.add_special_tokens)
            chat = validated(ChatBody, {**fields, "add_special_tokens": special})
            ids = (await prepare_chat(chat, view)).token_ids
        texts = [service.texts.text_of(token_id) for token_id in ids]
        return json_response(
            {
                "count": len(ids),
                "max_model_len": service.client.info.max_model_len,
                "tokens": list(ids),
                "token_strs": texts if body.return_token_strs else None,
            }
        )

    @router.post("/detokenize", openapi_extra=body_schema(DetokenizeBody))
    async def detokenize(request: Request) -> Response:
        body = await parsed_body(service, DetokenizeBody, request)
        service.named(body.model).model_name(body.model)
        size = service.client.info.vocab_size
        for position, token_id in enumerate(body.tokens):
            if not 0 <= token_id < size:
                raise invalid(
                    f"`tokens` holds {token_id} at position {position}; this model has the ids "
                    f"0 to {size - 1}",
                    param="tokens",
                )
        text = service.tokenizer.decode(body.tokens, skip_special_tokens=False)
        return json_response({"prompt": text, "content": text})

    @router.get("/tokenizer_info")
    async def tokenizer_info() -> Response:
        tokenizer, info = service.tokenizer, service.client.info
        return json_response(
            {
                **tokenizer.special_tokens(),
                "chat_template": tokenizer.chat_template_for(),
                "eos_token_ids": list(tokenizer.eos_token_ids),
                "vocab_size": tokenizer.vocab_size,
                "model_max_length": info.max_model_len,
            }
        )

    return router
