"""The page at `/`: one file, no build, nothing from another host.

Its script and style are inside the page and allowed by their hashes; the policy allows nothing
else, so that text of a model or of a stranger can never run. Whoever asks without wanting HTML
(curl, a probe) gets a short description in JSON.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import Response

from qtool import __version__
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.service import Service

PAGE = Path(__file__).parent / "web" / "index.html"


def content_security_policy(page: str) -> str:
    def allowed(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        digests = (hashlib.sha256(text.encode()).digest() for text in texts)
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return (
        f"default-src 'none'; script-src {allowed('script')}; style-src {allowed('style')}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )


def routes(service: Service) -> APIRouter:
    router = APIRouter()
    page = PAGE.read_text()
    headers = {
        "Content-Security-Policy": content_security_policy(page),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }

    @router.get("/")
    @router.head("/", include_in_schema=False)
    async def index(request: Request) -> Response:
        if "text/html" in request.headers.get("accept", ""):
            return Response(page, headers=headers, media_type="text/html")
        return json_response(
            {
                "server": "qtool",
                "version": __version__,
                "models": list(service.config.served_model_names),
                "api": [
                    "/v1/models", "/v1/chat/completions", "/v1/completions", "/v1/responses",
                    "/v1/embeddings", "/v1/messages", "/api/chat", "/api/generate", "/generate",
                    "/generate_stream", "/chat", "/tokenize", "/detokenize",
                ],
                "operations": ["/health", "/version", "/metrics", "/load", "/docs"],
            }
        )  # fmt: skip

    return router
