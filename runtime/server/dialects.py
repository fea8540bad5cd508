"""Which dialect a path belongs to, and its form of an error.

Clients read the body of an error as their own API writes it; OpenAI's form is the one for all else.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import orjson
from fastapi.responses import Response

from qtool.runtime.server.anthropic import anthropic_error
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.tgi import tgi_error


def _ollama_error(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}


# By what the path begins with; "/" alone is TGI's, too.
ERROR_BODIES: tuple[tuple[str, Callable[[ApiError], dict[str, Any]]], ...] = (
    ("/v1/messages", anthropic_error),
    ("/api/", _ollama_error),
    ("/generate", tgi_error),
    ("/invocations", tgi_error),
)


def in_dialect(path: str, error: ApiError) -> Response:
    for prefix, body in ERROR_BODIES:
        if path.startswith(prefix) or (prefix == "/generate" and path == "/"):
            return Response(
                orjson.dumps(body(error)),
                status_code=error.status,
                headers=error.headers,
                media_type="application/json",
            )
    return error.response()
