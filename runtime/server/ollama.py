"""Ollama's API: `/api/chat`, `/api/generate` and what its clients ask before them.

Streams are lines of JSON, not events, and are the default. Durations are nanoseconds. `options`
are Ollama's names of sampling values; those that shape the process (`num_ctx`, `num_thread`,
`num_gpu`) were settled when the server started and are passed over. Source:
github.com/ollama/ollama, docs/api.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qtool import __version__
from qtool.runtime.modelfile import Modelfile
from qtool.runtime.server.chat_exchange import ChatExchange
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.completions import CompletionExchange
from qtool.runtime.server.embeddings import EmbeddingBody, embed
from qtool.runtime.server.errors import invalid
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.ollama_answers import (
    OllamaChat,
    OllamaGenerate,
    OllamaRaw,
    assistant_message,
    details,
    entry,
    running_models,
    timestamp,
    without_tag,
)
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.parsing import Body, validated
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.service import Service

# Ollama's name of an option -> ours.
OPTIONS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "typical_p": "typical_p",
    "seed": "seed",
    "stop": "stop",
    "repeat_penalty": "repetition_penalty",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
}
ENDLESS = (-1, -2)  # num_predict: no limit; until the context is full


class OllamaBody(Body):
    model: str | None = None
    stream: bool | None = None
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None
    keep_alive: str | float | int | None = None

    @property
    def shared(self) -> dict[str, Any]:
        """The fields that OpenAI's bodies have as well."""
        given = self.options or {}
        fields = {
            ours: given[name] for name, ours in OPTIONS.items() if given.get(name) is not None
        }
        count = given.get("num_predict")
        if count is not None and count not in ENDLESS:
            fields["max_tokens"] = count
        if self.format == "json":
            fields["response_format"] = {"type": "json_object"}
        elif isinstance(self.format, dict):
            fields["guided_json"] = self.format
        elif self.format:
            raise invalid('`format` must be "json" or a JSON schema', param="format")
        if isinstance(self.think, str):
            fields["reasoning_effort"] = self.think
        elif self.think is not None:
            fields["reasoning"] = self.think
        return {**fields, "model": without_tag(self.model), "stream": self.stream is not False}


class OllamaChatBody(OllamaBody):
    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class OllamaGenerateBody(OllamaBody):
    prompt: str | None = None
    system: str | None = None
    raw: bool | None = None
    images: Annotated[list[Any], Field(max_length=0)] | None = None
    suffix: str | None = None


class OllamaModelBody(Body):
    model: str | None = None
    name: str | None = None

    @property
    def asked(self) -> str | None:
        return without_tag(self.model or self.name)


class OllamaEmbedBody(Body):
    model: str | None = None
    input: str | list[str] | None = None
    prompt: str | None = None
    dimensions: int | None = None
    truncate: bool | None = None


def routes(service: Service) -> APIRouter:
    router = APIRouter(prefix="/api")

    @router.post("/chat", openapi_extra=body_schema(OllamaChatBody))
    async def chat(request: Request) -> Response:
        body = await parsed_body(service, OllamaChatBody, request)
        if not body.messages:
            return json_response(_loaded(service, body, {"message": assistant_message("")}))
        messages = [_openai_message(message) for message in body.messages]
        fields = {**body.shared, "messages": messages, "tools": body.tools}
        return await ChatExchange(service, validated(ChatBody, fields), OllamaChat).response(
            request
        )

    @router.post("/generate", openapi_extra=body_schema(OllamaGenerateBody))
    async def generate(request: Request) -> Response:
        body = await parsed_body(service, OllamaGenerateBody, request)
        if body.suffix:
            raise invalid("`suffix` is not supported: the model cannot fill a gap", param="suffix")
        if not body.prompt:
            return json_response(_loaded(service, body, {"response": ""}))
        if body.raw:
            fields = {"max_tokens": None, **body.shared, "prompt": body.prompt}
            fields["max_tokens"] = fields["max_tokens"] or _room_behind(service, body.prompt)
            completion = validated(CompletionBody, fields)
            return await CompletionExchange(service, completion, OllamaRaw).response(request)
        messages = [{"role": "user", "content": body.prompt}]
        if body.system:
            messages.insert(0, {"role": "system", "content": body.system})
        fields = {**body.shared, "messages": messages}
        return await ChatExchange(service, validated(ChatBody, fields), OllamaGenerate).response(
            request
        )

    @router.get("/tags")
    async def tags() -> Response:
        made = (name for name, _ in service.made.all())
        names = dict.fromkeys((*_names(service), *service.config.also_served, *made))
        return json_response({"models": [entry(service, name) for name in names]})

    @router.get("/ps")
    async def ps() -> Response:
        return json_response(running_models([(service, None)]))

    @router.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @router.post("/show", openapi_extra=body_schema(OllamaModelBody))
    async def show(request: Request) -> Response:
        body = await parsed_body(service, OllamaModelBody, request)
        view = service.named(body.asked)
        return json_response(_shown(view, view.model_name(body.asked)))

    @router.post("/pull", openapi_extra=body_schema(OllamaModelBody))
    async def pull(request: Request) -> Response:
        # The model that is served is here; another one is fetched beside a running server.
        body = await parsed_body(service, OllamaModelBody, request)
        service.named(body.asked).model_name(body.asked)
        return json_response({"status": "success"})

    @router.post("/embed", openapi_extra=body_schema(OllamaEmbedBody))
    @router.post("/embeddings", include_in_schema=False)
    async def embeddings(request: Request) -> Response:
        body = await parsed_body(service, OllamaEmbedBody, request)
        older = body.input is None
        wanted = EmbeddingBody.model_validate(
            {
                "model": without_tag(body.model),
                "input": (body.prompt or "") if older else body.input,
                "dimensions": body.dimensions,
            }
        )
        found = await embed(service, wanted, request)
        if older:
            return json_response({"embedding": found.vectors[0]})
        return json_response(
            {
                "model": body.model or _names(service)[0],
                "embeddings": found.vectors,
                "total_duration": int(found.seconds * 1e9),
                "load_duration": 0,
                "prompt_eval_count": found.num_tokens,
            }
        )

    return router


def _room_behind(service: Service, prompt: str) -> int | None:
    info = service.client.info
    free = info.max_model_len - len(service.tokenizer.encode(prompt))
    return free if free > 0 else None


def _names(service: Service) -> Sequence[str]:
    return service.config.served_model_names


def _openai_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Ollama's message: images apart, thoughts as `thinking`, a tool's result by its name."""
    if message.get("images"):
        raise invalid("images are not supported: this server takes text", param="messages.images")
    fields = {**message, "content": message.get("content") or ""}
    if "thinking" in fields:
        fields["reasoning"] = fields["thinking"]
    if message.get("role") == "tool":
        fields.setdefault("name", message.get("tool_name"))
    return fields


def _loaded(service: Service, body: OllamaBody, empty: dict[str, Any]) -> dict[str, Any]:
    """The answer to a request without a prompt, with which clients load and unload models."""
    asked = without_tag(body.model)
    model = service.named(asked).model_name(asked)
    reason = "unload" if body.keep_alive in (0, "0", "0s") else "load"
    return {
        "model": model, "created_at": timestamp(), **empty, "done": True, "done_reason": reason
    }  # fmt: skip


def _shown(service: Service, name: str) -> dict[str, Any]:
    info, template = service.client.info, service.tokenizer.chat_template_for() or ""
    made = service.made.find(name) or Modelfile(name)
    capabilities = ["completion", "tools", "embedding"]
    if "</think>" in template:
        capabilities.append("thinking")
    return {
        "modelfile": made.text(),
        "parameters": "\n".join(made.parameter_lines()),
        "system": made.system or "",
        "template": template,
        "details": details(service),
        "model_info": {
            "general.architecture": info.format,
            "general.name": name,
            f"{info.format}.context_length": info.max_model_len,
            f"{info.format}.vocab_size": info.vocab_size,
        },
        "capabilities": capabilities,
        "modified_at": timestamp(service.created),
    }
