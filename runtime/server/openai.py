"""The OpenAI API: `/v1/models`, `/v1/completions` and `/v1/chat/completions`.

Bodies are read as bytes and parsed as JSON whatever their Content-Type, since `curl -d` without a
header says urlencoded. Answers are bytes made by orjson; nothing is validated on the way out.
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qtool.runtime.server.chat_exchange import ChatExchange
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.completions import CompletionExchange
from qtool.runtime.server.exchange import json_response, read_body
from qtool.runtime.server.parsing import Body, SomeBody, parse
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.service import Service


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models")
    @router.get("/models", include_in_schema=False)
    async def models() -> Response:
        names = (*service.config.served_model_names, *service.adapter_names)
        listed = [_model_card(service, name) for name in names]
        made = [name for name, _ in service.made.all()]
        listed += [_model_card(service.named(name), name) for name in made]
        others = (name for name in service.config.also_served if name not in made)
        listed += [_unloaded_card(service, name) for name in others]
        return json_response({"object": "list", "data": listed})

    @router.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name in service.config.also_served:
            return json_response(_unloaded_card(service, name))
        view = service.named(name)
        return json_response(_model_card(view, view.model_name(name)))

    @router.post("/v1/completions", openapi_extra=body_schema(CompletionBody))
    async def completions(request: Request) -> Response:
        body = await parsed_body(service, CompletionBody, request)
        return await CompletionExchange(service, body).response(request)

    @router.post("/v1/chat/completions", openapi_extra=body_schema(ChatBody))
    @router.post("/chat/completions", include_in_schema=False)
    async def chat_completions(request: Request) -> Response:
        body = await parsed_body(service, ChatBody, request)
        return await ChatExchange(service, body).response(request)

    return router


async def parsed_body(service: Service, body_type: type[SomeBody], request: Request) -> SomeBody:
    return parse(body_type, await read_body(request, service.config.max_body_bytes))


def body_schema(body_type: type[Body]) -> dict[str, Any]:
    # Only for /docs; the names are resolved by app.openapi_schema.
    schema = {"$ref": f"#/components/schemas/{body_type.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _unloaded_card(service: Service, name: str) -> dict[str, object]:
    """A model that is loaded on its first use; more is known of it then."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qtool",
        "root": name,
        "parent": None,
        "permission": [],
    }


def _model_card(service: Service, name: str) -> dict[str, object]:
    info = service.client.info
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "qtool",
        "root": service.config.model_root,
        "parent": service.parent_of(name),
        "max_model_len": info.max_model_len,
        "permission": [],
        "qtool": {
            "format": info.format,
            "dtype": info.dtype,
            "device": info.device,
            "chat_template": service.tokenizer.chat_template_origin,
        },
    }
