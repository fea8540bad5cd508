"""Ollama's routes that make, copy and remove names, over this user's store.

A name is made from a model that is served here, or from another such name, and answers at once
(`made_models.py`). What these routes cannot do is refused with what to do instead: weights never
come or go through them. Source: github.com/ollama/ollama, docs/api.md.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qtool.runtime.modelfile import (
    ROLES,
    Modelfile,
    jinja_template,
    parse_modelfile,
    read_parameters,
)
from qtool.runtime.server.answers import NDJSON
from qtool.runtime.server.chat_templates import CHAT_TEMPLATES
from qtool.runtime.server.config import LOCAL_ORIGINS
from qtool.runtime.server.errors import ApiError, invalid
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.ollama_answers import line, without_tag
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.parsing import Body
from qtool.runtime.server.service import Service


class OllamaCreateBody(Body):
    """modelfile: how older clients send all of it in one text."""

    model: str | None = None
    name: str | None = None
    from_: str | None = Field(None, alias="from")
    modelfile: str | None = None
    system: str | None = None
    template: str | None = None
    parameters: dict[str, Any] | None = None
    messages: list[dict[str, Any]] | None = None
    adapters: dict[str, Any] | None = None
    files: dict[str, Any] | None = None
    quantize: str | None = None
    stream: bool | None = None


class OllamaCopyBody(Body):
    source: str
    destination: str


class OllamaDeleteBody(Body):
    model: str | None = None
    name: str | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.post("/create", openapi_extra=body_schema(OllamaCreateBody))
    async def create(request: Request) -> Response:
        _refuse_other_pages(service, request)
        body = await parsed_body(service, OllamaCreateBody, request)
        name = _new_name(service, body.model or body.name, "model")
        made = made_of(body, any_template=service.config.trust_request_template)
        service.made.store.keep(name, _on_what_is_served(service, made))
        said = [{"status": "writing manifest"}, {"status": "success"}]
        if body.stream is False:
            return json_response(said[-1])
        return Response(b"".join(map(line, said)), media_type=NDJSON)

    @router.post("/copy", openapi_extra=body_schema(OllamaCopyBody))
    async def copy(request: Request) -> Response:
        _refuse_other_pages(service, request)
        body = await parsed_body(service, OllamaCopyBody, request)
        target = _new_name(service, body.destination, "destination")
        source = _on_what_is_served(service, Modelfile(without_tag(body.source) or ""))
        service.made.store.keep(target, source)
        return Response()

    @router.delete("/delete", openapi_extra=body_schema(OllamaDeleteBody))
    async def delete(request: Request) -> Response:
        body = await parsed_body(service, OllamaDeleteBody, request)
        name = without_tag(body.model or body.name) or ""
        if service.made.store.remove(name):
            service.made.views.pop(name, None)
            return Response()
        service.named(name).model_name(name or "?")  # 404 with a guess, unless it is served
        raise invalid(
            f"`{name:.200}` is the model that is served; names made from it can be deleted",
            param="model",
        )

    @router.post("/push", include_in_schema=False)
    @router.post("/blobs/{digest:path}", include_in_schema=False)
    async def not_offered(request: Request) -> Response:
        raise invalid(
            "Weights do not come or go through this server; see `qtool pull` and "
            "`qtool quantize --push-to-hub`",
            code="not_offered",
        )

    return router


def _refuse_other_pages(service: Service, request: Request) -> None:
    """What a name is made of is kept and shapes later answers. A browser sends a page's POST in
    plain text without asking first, whatever page it is; only where it comes from tells.
    """
    origin, host = request.headers.get("origin"), request.headers.get("host")
    allowed = service.config.allowed_origins
    if origin is None or origin.partition("://")[2] == host:
        return
    if origin in allowed or "*" in allowed:
        return
    if not allowed and re.fullmatch(LOCAL_ORIGINS, origin):
        return
    raise ApiError(
        403,
        f"Pages of {origin:.200} may not make names here; see --allowed-origins",
        type="permission_error",
        code="origin_not_allowed",
    )


def made_of(body: OllamaCreateBody, *, any_template: bool) -> Modelfile:
    """any_template: else only built-in ones, by name; a template can run for ever."""
    for field in ("files", "adapters", "quantize"):
        if getattr(body, field):
            raise invalid(
                f"`{field}` is not taken over HTTP: use `qtool create -f Modelfile` or "
                "`qtool quantize` on the server's machine",
                param=field,
            )
    if body.modelfile is not None:
        made = parse_modelfile(body.modelfile, "modelfile")
        if made.adapter is not None:
            raise invalid(
                "`ADAPTER` is not taken over HTTP: use `qtool create -f Modelfile` on the "
                "server's machine",
                param="modelfile",
            )
    elif body.from_ is None:
        raise invalid("`from` is required: the name of a model that is served", param="from")
    else:
        made = Modelfile(body.from_)
    template = made.template if body.template is None else jinja_template(body.template, "template")
    if template and template not in CHAT_TEMPLATES and not any_template:
        raise invalid(
            f"`template` must be one of {', '.join(CHAT_TEMPLATES)}; others are taken by a server "
            "started with --trust-request-chat-template",
            param="template",
        )
    return replace(
        made,
        system=made.system if body.system is None else body.system,
        template=template or None,
        parameters={**made.parameters, **read_parameters(body.parameters or {})},
        messages=made.messages if body.messages is None else tuple(map(_message, body.messages)),
    )


def _message(message: dict[str, Any]) -> dict[str, str]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES or not isinstance(content, str):
        raise invalid(
            f"`messages` need a role of {', '.join(ROLES)} and a content in text",
            param="messages",
        )
    return {"role": role, "content": content}


def _new_name(service: Service, given: str | None, param: str) -> str:
    name = without_tag(given)
    if not name:
        raise invalid(f"`{param}` is required", param=param)
    if service.answers_to(name):
        raise invalid(f"`{name:.200}` is the name of a model that is served", param=param)
    return name


def _on_what_is_served(service: Service, made: Modelfile) -> Modelfile:
    """The same, FROM as the store knows it: only what is served, never a path of the client's."""
    base = without_tag(made.base) or ""
    if base in service.adapter_names:
        raise invalid(
            f"`{base:.200}` is an adapter, and names are made from models here: use "
            "`qtool create -f Modelfile` with FROM and ADAPTER on the server's machine",
            param="from",
        )
    if service.answers_to(base):
        return replace(made, base=service.config.model_root or base)
    if base in service.config.also_served or service.made.store.find(base) is not None:
        return replace(made, base=base)
    raise ApiError(
        404,
        f"`from` is `{base:.200}`, which is not served here; "
        f"here are: {', '.join(service.config.served_model_names)}",
        type="not_found_error",
        param="from",
        code="model_not_found",
    )
