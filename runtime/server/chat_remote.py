"""Chat with any server that speaks OpenAI's API. Imports no torch: nothing runs here."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import orjson

from qtool.errors import QtoolError, UnknownName
from qtool.runtime.server.chat_backends import AnswerEnd, Message, Stopwatch

CONNECT_SECONDS = 10.0


class RemoteChat:
    def __init__(self, url: str, *, model: str | None = None, api_key: str | None = None) -> None:
        base = url.rstrip("/")
        self._base = base if base.endswith("/v1") else f"{base}/v1"
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        timeout = httpx.Timeout(None, connect=CONNECT_SECONDS)
        self._http = httpx.Client(headers=headers, timeout=timeout)
        try:
            self.name = self._choose(model)
        except BaseException:
            self._http.close()
            raise

    def _choose(self, model: str | None) -> str:
        with _as_user_errors(self._base):
            response = self._http.get(f"{self._base}/models", timeout=CONNECT_SECONDS)
            _raise_for_error(response)
            names = [str(entry["id"]) for entry in response.json()["data"]]
        if model is not None and model not in names:
            raise UnknownName("model on this server", model, names)
        if model is None and not names:
            raise QtoolError(f"the server at {self._base} lists no models")
        return model or names[0]

    def answer(
        self, messages: Sequence[Message], sampling: Mapping[str, Any]
    ) -> Generator[str | AnswerEnd, None, None]:
        body = {
            **sampling,
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        watch = Stopwatch()
        finish_reason, usage = "stop", {"prompt_tokens": 0, "completion_tokens": 0}
        headers = {"Content-Type": "application/json"}
        with (
            _as_user_errors(self._base),
            self._http.stream(
                "POST",
                f"{self._base}/chat/completions",
                content=orjson.dumps(body),
                headers=headers,
            ) as response,
        ):
            if response.is_error:
                response.read()
                _raise_for_error(response)
            for chunk in _events(response):
                if "error" in chunk:
                    raise QtoolError(f"the server gave up: {chunk['error'].get('message')}")
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices", []):
                    finish_reason = choice.get("finish_reason") or finish_reason
                    if text := choice.get("delta", {}).get("content"):
                        watch.text_came()
                        yield text
        yield watch.end(finish_reason, usage["prompt_tokens"], usage["completion_tokens"])

    def close(self) -> None:
        self._http.close()


def _events(response: httpx.Response) -> Iterator[dict[str, Any]]:
    for line in response.iter_lines():
        if line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            if data == "[DONE]":
                return
            yield orjson.loads(data)


@contextmanager
def _as_user_errors(base: str) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError:
        raise QtoolError(
            f"no server answers at {base}", "start one with: qtool serve MODEL"
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise QtoolError(f"{base}: {error or type(error).__name__}") from None
    except (orjson.JSONDecodeError, ValueError, KeyError, TypeError, AttributeError):
        raise QtoolError(
            f"what answers at {base} does not speak OpenAI's API",
            "the URL ends where /v1/chat/completions would begin",
        ) from None


def _raise_for_error(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        message = response.text[:200] or response.reason_phrase
    hint = "pass the server's key with --api-key" if response.status_code == 401 else None
    raise QtoolError(f"the server answered {response.status_code}: {message}", hint)
