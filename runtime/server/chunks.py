"""The JSON of OpenAI's streams, written as bytes.

A stream writes one chunk a token, so all that does not change is encoded once: the chunk of a token
is four joined byte strings and one `orjson.dumps` of its text. What each client needs of the order
and content of chunks:

    chat         {"role": "assistant", "content": ""}    first, once; role never again
                 {"content": "..."}                      one a step; content is never null, since
                                                         simple readers print what they get
                 {} with finish_reason                   last
    completions  {"text": "..."}                         one a step, the last with finish_reason
    both         {"choices": [], "usage": {...}}         only with stream_options.include_usage,
                                                         since simple readers take choices[0]; the
                                                         chunks before it then say "usage": null
                 [DONE]                                  always, after an error too
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from qtool.runtime.server.answers import Usage
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.protocol import GenerationBody

DONE = b"data: [DONE]\n\n"
ROLE_DELTA = b'{"role":"assistant","content":""}'
EMPTY_DELTA = b"{}"


class ChunkWriter:
    """Chunks of one stream, with usage on none, on all or at the end, as the request asks."""

    def __init__(self, head: Mapping[str, Any], body: GenerationBody) -> None:
        # {"id":..,"object":..} without its closing brace
        self._head = b"data: " + orjson.dumps(head)[:-1]
        self._includes_usage = body.include_usage
        self._counts_up = body.usage_on_every_chunk

    def chat(
        self,
        index: int,
        delta: bytes,
        usage: Usage,
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
        token_ids: list[int] | None = None,
    ) -> bytes:
        return self._chunk(
            index, b'"delta":' + delta, usage, logprobs, finish_reason, stop_reason, token_ids
        )

    def completion(
        self,
        index: int,
        text: str,
        usage: Usage,
        *,
        logprobs: Mapping[str, Any] | None = None,
        finish_reason: str | None = None,
        stop_reason: str | int | None = None,
        token_ids: list[int] | None = None,
    ) -> bytes:
        content = b'"text":' + orjson.dumps(text)
        return self._chunk(index, content, usage, logprobs, finish_reason, stop_reason, token_ids)

    def _chunk(
        self,
        index: int,
        content: bytes,
        usage: Usage,
        logprobs: Mapping[str, Any] | None,
        finish_reason: str | None,
        stop_reason: str | int | None,
        token_ids: list[int] | None,
    ) -> bytes:
        told = b"null" if logprobs is None else orjson.dumps(logprobs)
        ids = b"" if token_ids is None else b',"token_ids":' + orjson.dumps(token_ids)
        if finish_reason is None:
            ending = b',"logprobs":%b,"finish_reason":null%b}]' % (told, ids)
        else:
            ending = b',"logprobs":%b,"finish_reason":"%b","stop_reason":%b%b}]' % (
                told,
                finish_reason.encode(),
                orjson.dumps(stop_reason),
                ids,
            )
        return b'%b,"choices":[{"index":%d,%b%b%b}\n\n' % (
            self._head,
            index,
            content,
            ending,
            self._counts(usage),
        )

    def _counts(self, usage: Usage) -> bytes:
        if self._counts_up:
            return b',"usage":' + orjson.dumps(usage.as_dict())
        return b',"usage":null' if self._includes_usage else b""

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that closes a stream with include_usage; else nothing."""
        if not self._includes_usage:
            return b""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, orjson.dumps(usage.as_dict()))


def content_delta(text: str) -> bytes:
    return b'{"content":' + orjson.dumps(text) + b"}"


def reasoning_delta(text: str) -> bytes:
    """Under both names, since a client reads one of them."""
    encoded = orjson.dumps(text)
    return b'{"reasoning":%b,"reasoning_content":%b}' % (encoded, encoded)


def call_delta(position: int, call_id: str, name: str) -> bytes:
    function = {"name": name, "arguments": ""}
    return orjson.dumps(
        {
            "tool_calls": [
                {"index": position, "id": call_id, "type": "function", "function": function}
            ]
        }
    )


def arguments_delta(position: int, text: str) -> bytes:
    return orjson.dumps({"tool_calls": [{"index": position, "function": {"arguments": text}}]})


def error_event(error: ApiError) -> bytes:
    """An error after the headers are gone: an event that openai-python and guidellm raise on."""
    return b"data: " + error.body() + b"\n\n"
