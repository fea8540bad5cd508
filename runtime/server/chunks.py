"""The JSON of answers, whole and streamed, written as bytes.

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

from dataclasses import dataclass

import orjson

from qtool.runtime.server.errors import ApiError

DONE = b"data: [DONE]\n\n"
ROLE_DELTA = b'{"role":"assistant","content":""}'
EMPTY_DELTA = b"{}"


@dataclass(slots=True)
class Usage:
    """Token counts of one HTTP request, over all its choices."""

    prompt_tokens: int
    completion_tokens: int = 0
    cached_tokens: int = 0

    def as_dict(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


class ChunkWriter:
    """Chunks of one stream. `usage`: None leaves the field out."""

    def __init__(self, head: dict[str, object]) -> None:
        # {"id":..,"object":..} without its closing brace
        self._head = b"data: " + orjson.dumps(head)[:-1]

    def chat(
        self,
        index: int,
        delta: bytes,
        *,
        finish_reason: str | None = None,
        stop_reason: str | None = None,
        usage: bytes | None = None,
    ) -> bytes:
        return self._chunk(index, b'"delta":' + delta, finish_reason, stop_reason, usage)

    def completion(
        self,
        index: int,
        text: str,
        *,
        finish_reason: str | None = None,
        stop_reason: str | None = None,
        usage: bytes | None = None,
    ) -> bytes:
        return self._chunk(
            index, b'"text":' + orjson.dumps(text), finish_reason, stop_reason, usage
        )

    def _chunk(
        self,
        index: int,
        content: bytes,
        finish_reason: str | None,
        stop_reason: str | None,
        usage: bytes | None,
    ) -> bytes:
        if finish_reason is None:
            ending = b',"logprobs":null,"finish_reason":null}]'
        else:
            ending = b',"logprobs":null,"finish_reason":"%b","stop_reason":%b}]' % (
                finish_reason.encode(),
                orjson.dumps(stop_reason),
            )
        counts = b"" if usage is None else b',"usage":' + usage
        return b'%b,"choices":[{"index":%d,%b%b%b}\n\n' % (
            self._head,
            index,
            content,
            ending,
            counts,
        )

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that closes a stream with include_usage."""
        return b'%b,"choices":[],"usage":%b}\n\n' % (self._head, orjson.dumps(usage.as_dict()))


def content_delta(text: str) -> bytes:
    return b'{"content":' + orjson.dumps(text) + b"}"


def error_event(error: ApiError) -> bytes:
    """An error after the headers are gone: an event that openai-python and guidellm raise on."""
    return b"data: " + error.body() + b"\n\n"
