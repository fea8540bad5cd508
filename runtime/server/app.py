"""The web application over one engine. Everything it needs is given to `create_app`; whoever calls
it has started the engine and will stop it.
"""

from __future__ import annotations

from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from qtool import __version__
from qtool.errors import QtoolError, closest
from qtool.runtime.server import (
    anthropic,
    embeddings,
    ollama,
    ollama_names,
    openai,
    plain,
    responses,
    tgi,
    tokens,
    web_page,
)
from qtool.runtime.server.asgi import ClientGone
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.config import LOCAL_ORIGINS
from qtool.runtime.server.dialects import in_dialect
from qtool.runtime.server.docs_page import add_docs_page
from qtool.runtime.server.embeddings import EmbeddingBody
from qtool.runtime.server.errors import ApiError, from_qtool_error, internal, unavailable
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.middleware import (
    ApiKeyMiddleware,
    HttpMetricsMiddleware,
    RequestIdMiddleware,
)
from qtool.runtime.server.parsing import Body
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.responses_protocol import ResponsesBody
from qtool.runtime.server.service import Service, logger

CLIENT_CLOSED_REQUEST = 499  # nginx's number; nobody is left to read it but a log
ROUTES = (
    openai.routes,
    responses.routes,
    embeddings.routes,
    anthropic.routes,
    ollama.routes,
    ollama_names.routes,
    tgi.routes,
    plain.routes,
    tokens.routes,
    web_page.routes,
)
BODIES: tuple[type[Body], ...] = (
    ChatBody,
    CompletionBody,
    ResponsesBody,
    EmbeddingBody,
    anthropic.MessagesBody,
    ollama.OllamaChatBody,
    ollama.OllamaGenerateBody,
    ollama.OllamaModelBody,
    ollama.OllamaEmbedBody,
    ollama_names.OllamaCreateBody,
    ollama_names.OllamaCopyBody,
    ollama_names.OllamaDeleteBody,
    tgi.TgiBody,
    plain.PlainBody,
    tokens.TokenizeBody,
    tokens.DetokenizeBody,
)
SCHEMA_REFERENCE = "#/components/schemas/{model}"


def create_app(service: Service) -> FastAPI:
    app = FastAPI(
        title="qtool",
        version=__version__,
        description="An OpenAI-compatible server.",
        root_path=service.config.root_path,
        docs_url=None,
        redoc_url=None,
    )
    for routes in ROUTES:
        app.include_router(routes(service))
    _add_operations(app, service)
    _add_error_handlers(app, service)
    _add_middleware(app, service)
    _describe_bodies(app)
    add_docs_page(app)
    return app


def _add_operations(app: FastAPI, service: Service) -> None:
    """What probes, scrapers and people looking around ask for; none of it needs an API key."""

    @app.get("/health")
    @app.get("/ping", include_in_schema=False)
    @app.head("/health", include_in_schema=False)
    @app.head("/ping", include_in_schema=False)
    async def health() -> Response:
        if not service.admission.is_open:
            raise unavailable("Shutting down", code="shutting_down", retry_after_seconds=5)
        if not service.client.healthy():
            raise unavailable("The engine has failed", code="engine_failed", retry_after_seconds=5)
        return json_response({"status": "ok"})

    @app.get("/version")
    async def version() -> Response:
        return json_response({"version": __version__})

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        exposition = service.metrics.expose(request.headers.get("accept", ""))
        return Response(exposition.body, headers={"Content-Type": exposition.content_type})

    @app.get("/load")
    async def load() -> Response:
        stats = service.client.stats()
        inside = service.admission.num_inside
        return json_response(
            {
                "server_load": inside,
                "num_requests_running": stats.num_requests_running,
                "num_requests_waiting": stats.num_requests_waiting,
                "kv_cache_usage": stats.kv_cache_usage,
            }
        )


def _add_error_handlers(app: FastAPI, service: Service) -> None:
    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, ApiError)
        if error.code in service.metrics.rejections:
            service.metrics.rejections[error.code].inc()
        if service.config.log_requests:
            path, message = printable(request.url.path[:200]), printable(error.message)
            logger.info("%s %s: %d, %s", request.method, path, error.status, message)
        return in_dialect(request.url.path, error)

    async def misused(request: Request, error: Exception) -> Response:
        assert isinstance(error, QtoolError)
        return in_dialect(request.url.path, from_qtool_error(error))

    async def client_gone(request: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_CLOSED_REQUEST)

    async def not_found(request: Request, error: Exception) -> Response:
        path = request.url.path
        guess = closest(path, app.openapi()["paths"])
        hint = f"; did you mean {guess}?" if guess else ""
        return in_dialect(
            path,
            ApiError(
                404, f"There is no {path:.200}{hint}", type="not_found_error", code="unknown_url"
            ),
        )

    async def wrong_method(request: Request, error: Exception) -> Response:
        allowed = getattr(error, "headers", None) or {}
        ways = allowed.get("Allow", "another method")
        return in_dialect(
            request.url.path,
            ApiError(
                405,
                f"{request.url.path:.200} does not take {request.method}; use {ways}",
                code="method_not_allowed",
                headers=allowed,
            ),
        )

    async def failed(request: Request, error: Exception) -> Response:
        # Starlette raises the error on after this answer, and uvicorn logs its traceback.
        return in_dialect(request.url.path, internal())

    app.add_exception_handler(ApiError, refused)
    app.add_exception_handler(QtoolError, misused)
    app.add_exception_handler(ClientGone, client_gone)
    app.add_exception_handler(404, not_found)
    app.add_exception_handler(405, wrong_method)
    app.add_exception_handler(Exception, failed)


def printable(text: str) -> str:
    """Clients' text for the log: no line breaks or terminal sequences that could fake a line."""
    return "".join(character if character.isprintable() else "?" for character in text)


def _add_middleware(app: FastAPI, service: Service) -> None:
    """The last one added is the outermost: CORS answers preflights before a key is asked for."""
    if service.config.api_keys:
        app.add_middleware(ApiKeyMiddleware, keys=service.config.api_keys)
    app.add_middleware(HttpMetricsMiddleware, metrics=service.metrics)
    app.add_middleware(RequestIdMiddleware)
    origins = service.config.allowed_origins
    app.add_middleware(
        CORSMiddleware,
        allow_origins=list(origins),
        allow_origin_regex=None if origins else LOCAL_ORIGINS,
        allow_methods=list(service.config.allowed_methods),
        allow_headers=list(service.config.allowed_headers),
        allow_credentials=service.config.allow_credentials,
        expose_headers=["x-request-id"],
    )


def _describe_bodies(app: FastAPI) -> None:
    """Put the request bodies into /openapi.json: routes read bytes, so FastAPI cannot know them."""
    generated = app.openapi

    def with_bodies() -> dict[str, Any]:
        document = generated()
        bodies: list[tuple[type[BaseModel], Literal["validation"]]] = [
            (body, "validation") for body in BODIES
        ]
        _, definitions = models_json_schema(bodies, ref_template=SCHEMA_REFERENCE)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        schemas.update(definitions["$defs"])
        return document

    app.openapi = with_bodies  # type: ignore[method-assign]
