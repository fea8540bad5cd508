"""`POST /v1/embeddings`: vectors of texts from the model's hidden states.

The model was made to write, not to embed: texts that mean the same lie near each other, but less
so than with a model trained for it. `pooling` says how the states of a text become one vector,
"mean" (the default) or "last". Vectors have length 1; `dimensions` keeps their first ones.
"""

from __future__ import annotations

import base64
import math
import struct
import time
from typing import Annotated, Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field, field_validator

from qtool.errors import QtoolError
from qtool.runtime.server.asgi import unless_client_goes
from qtool.runtime.server.errors import context_length_exceeded, unavailable
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.limits import client_of
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.parsing import Body, Int
from qtool.runtime.server.prompts import completion_prompts
from qtool.runtime.server.protocol import CompletionBody, PromptInput
from qtool.runtime.server.service import Service

MAX_TEXTS = 2048  # OpenAI's own limit


class EmbeddingBody(Body):
    model: str | None = None
    input: Any
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[Int, Field(ge=1)] | None = None
    pooling: Literal["mean", "last"] | None = None

    @field_validator("input", mode="plain", json_schema_input_type=PromptInput)
    @classmethod
    def _like_a_prompt(cls, value: object) -> object:
        prompts = CompletionBody._one_entry_a_prompt(value)
        if len(prompts) > MAX_TEXTS:
            raise ValueError(f"has {len(prompts)} texts, at most {MAX_TEXTS} are taken")
        return prompts


class Embedded(NamedTuple):
    vectors: list[list[float]]
    num_tokens: int
    seconds: float


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings", openapi_extra=body_schema(EmbeddingBody))
    async def embeddings(request: Request) -> Response:
        body = await parsed_body(service, EmbeddingBody, request)
        model = service.named(body.model).model_name(body.model)
        found = await embed(service, body, request)
        as_text = body.encoding_format == "base64"
        return json_response(
            {
                "object": "list",
                "data": [
                    {
                        "object": "embedding",
                        "index": index,
                        "embedding": _base64(vector) if as_text else vector,
                    }
                    for index, vector in enumerate(found.vectors)
                ],
                "model": model,
                "usage": {"prompt_tokens": found.num_tokens, "total_tokens": found.num_tokens},
            }
        )

    return router


async def embed(service: Service, body: EmbeddingBody, request: Request) -> Embedded:
    begun = time.monotonic()
    service.named(body.model).model_name(body.model)
    info = service.client.info
    texts = CompletionBody.model_construct(prompt=body.input)
    prompts = await completion_prompts(texts, service.tokenizer, info, param="input")
    for prompt in prompts:
        if len(prompt.token_ids) > info.max_model_len:
            raise context_length_exceeded(
                limit=info.max_model_len,
                num_prompt_tokens=len(prompt.token_ids),
                max_tokens=None,
                param="input",
            )

    async def all_of_them() -> list[list[float]]:
        pooling = body.pooling or "mean"
        return [await service.client.embed(prompt.token_ids, pooling) for prompt in prompts]

    try:
        with service.admission.enter(1, client_of(request.scope)):
            vectors = await unless_client_goes(request.receive, all_of_them())
    except QtoolError as error:
        raise unavailable(error.message, code="engine_unavailable", retry_after_seconds=5) from None
    if body.dimensions is not None:
        vectors = [_shortened(vector, body.dimensions) for vector in vectors]
    num_tokens = sum(len(prompt.token_ids) for prompt in prompts)
    return Embedded(vectors, num_tokens, time.monotonic() - begun)


def _shortened(vector: list[float], dimensions: int) -> list[float]:
    kept = vector[:dimensions]
    length = math.sqrt(sum(value * value for value in kept)) or 1.0
    return [value / length for value in kept]


def _base64(vector: list[float]) -> str:
    """Little-endian float32, as OpenAI's client unpacks them."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
