"""What a refused request gets: an HTTP status and the error body that OpenAI clients read.

The body is always ``{"error": {"message", "type", "param", "code"}}``. openai-python retries 408,
409, 429 and every 5xx, so bad input must never be a 5xx (it would be sent three times), and an
overloaded server must say `Retry-After`. LangChain looks for the text `context_length_exceeded`
in the message of a 400 to tell an overlong prompt from other mistakes.
"""

from __future__ import annotations

from collections.abc import Mapping

import orjson
from fastapi.responses import Response

from qtool.errors import QtoolError


class ApiError(Exception):
    """A request that is answered with an error. Raised anywhere before the first byte is sent."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.type = type
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        error = {
            "message": self.message,
            "type": self.type,
            "param": self.param,
            "code": self.code,
        }
        return orjson.dumps({"error": error})

    def response(self) -> Response:
        return Response(
            self.body(),
            status_code=self.status,
            headers=self.headers,
            media_type="application/json",
        )


def invalid(message: str, *, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request is wrong, and sending it again would not help."""
    return ApiError(400, message, param=param, code=code)


def from_qtool_error(error: QtoolError) -> ApiError:
    """A library error on the way to the engine is always about what was asked: a 400."""
    text = f"{error.message} (hint: {error.hint})" if error.hint else error.message
    return invalid(text)


def context_length_exceeded(
    *, limit: int, num_prompt_tokens: int, max_tokens: int | None, param: str
) -> ApiError:
    """400 in OpenAI's words, which clients match on. Nothing is ever cut off to make it fit."""
    if max_tokens is None:
        asked = f"your prompt has {num_prompt_tokens} tokens, which leaves no room for an answer"
        cure = "shorten the prompt"
    else:
        asked = (
            f"you requested {num_prompt_tokens + max_tokens} tokens "
            f"({num_prompt_tokens} in the prompt, {max_tokens} in the completion)"
        )
        cure = "shorten the prompt or lower max_tokens"
    message = (
        f"This model's maximum context length is {limit} tokens, but {asked}. Please {cure} "
        "(context_length_exceeded)."
    )
    return invalid(message, param=param, code="context_length_exceeded")


def unavailable(message: str, *, code: str, retry_after_seconds: int) -> ApiError:
    """503 with the time after which trying again is worth it: the server cannot serve now."""
    return ApiError(
        503,
        message,
        type="overloaded_error",
        code=code,
        headers={"Retry-After": str(retry_after_seconds)},
    )


def too_many(message: str, *, code: str, retry_after_seconds: int) -> ApiError:
    """429 with the time after which there may be room: clients ask for more than is served."""
    return ApiError(
        429,
        message,
        type="rate_limit_error",
        code=code,
        headers={"Retry-After": str(retry_after_seconds)},
    )


def deadline_passed() -> ApiError:
    """504; not to be sent again at once, which would take as long."""
    return ApiError(
        504,
        "The answer was not complete within the time that the request or the server allows",
        type="timeout_error",
        code="deadline_exceeded",
        headers={"x-should-retry": "false"},
    )


def internal() -> ApiError:
    """500 without a word about the inside: the traceback is in the server's log."""
    return ApiError(
        500, "The server failed on this request; its log says why.", type="server_error"
    )
