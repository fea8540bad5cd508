"""How Ollama writes answers: lines of JSON, the last with counts and times in nanoseconds.

OllamaChat      a message a line
OllamaGenerate  the text under `response`
OllamaRaw       the same, of a prompt that went to the model as it was
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import orjson

from qtool.runtime.server.answers import NDJSON, AnswerWriter, Head, Timing, Usage
from qtool.runtime.server.call_readers import CallArguments, CallStart
from qtool.runtime.server.chat_exchange import ChatHead, ChatWriter
from qtool.runtime.server.errors import ApiError
from qtool.runtime.server.generation import Answer, Piece
from qtool.runtime.server.message_parser import Call, Content, Part, Reasoning
from qtool.runtime.server.prompts import Prompt
from qtool.runtime.server.protocol import CompletionBody
from qtool.runtime.server.service import Service
from qtool.runtime.server.token_texts import TokenTexts

LATEST = ":latest"
NEVER = "9999-12-31T23:59:59Z"


def timestamp(seconds: float | None = None) -> str:
    moment = datetime.now(UTC) if seconds is None else datetime.fromtimestamp(seconds, UTC)
    return moment.isoformat().replace("+00:00", "Z")


def without_tag(model: str | None) -> str | None:
    return model.removesuffix(LATEST) if model else None


def details(service: Service) -> dict[str, Any]:
    info = service.client.info
    return {
        "parent_model": "",
        "format": "gguf" if info.format.startswith("gguf") else "safetensors",
        "family": info.format,
        "families": [info.format],
        "parameter_size": "",
        "quantization_level": info.format,
    }


def entry(service: Service, name: str) -> dict[str, Any]:
    return {
        "name": name,
        "model": name,
        "modified_at": timestamp(service.created),
        "size": service.client.info.weight_bytes,
        "digest": "",
        "details": details(service),
    }


def running_models(services: Iterable[tuple[Service, float | None]]) -> dict[str, Any]:
    """`/api/ps`: each loaded model, and when it goes if nobody uses it any more."""
    models = []
    for service, expires in services:
        info = service.client.info
        size = info.weight_bytes + info.kv_cache_bytes
        running = {
            "size": size,
            "size_vram": size if info.device.startswith("cuda") else 0,
            "context_length": info.max_model_len,
            "expires_at": NEVER if expires is None else timestamp(expires),
        }
        names = service.config.served_model_names
        models += [{**entry(service, name), **running} for name in names]
    return {"models": models}


def assistant_message(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def durations(usage: Usage, timing: Timing) -> dict[str, Any]:
    return {
        "total_duration": int(timing.total * 1e9),
        "load_duration": 0,
        "prompt_eval_count": usage.prompt_tokens,
        "prompt_eval_duration": int(timing.to_first_token * 1e9),
        "eval_count": usage.completion_tokens,
        "eval_duration": int((timing.total - timing.to_first_token) * 1e9),
    }


def line(document: Mapping[str, Any]) -> bytes:
    return orjson.dumps(document) + b"\n"


class _Lines:
    """What all three kinds of answer share: their head and their last line."""

    def __init__(self, head: Head) -> None:
        self._model = head.model
        self._reason = "stop"

    def line(self, content: Mapping[str, Any], *, done: bool = False) -> dict[str, Any]:
        return {"model": self._model, "created_at": timestamp(), **content, "done": done}

    def last(self, content: Mapping[str, Any], usage: Usage, timing: Timing) -> dict[str, Any]:
        return {
            **self.line(content, done=True),
            "done_reason": self._reason,
            **durations(usage, timing),
        }

    def ended(self, reason: str | None) -> None:
        if reason is not None:
            self._reason = "length" if reason == "length" else "stop"


def _call(call: Call) -> dict[str, Any]:
    try:
        arguments = orjson.loads(call.arguments or "{}")
    except orjson.JSONDecodeError:  # cut short by max_tokens
        arguments = {"": call.arguments}
    return {"function": {"name": call.name, "arguments": arguments}}


class OllamaChat(ChatWriter):
    """A call is sent when it is complete: Ollama's arguments are an object."""

    media_type = NDJSON

    def __init__(self, head: ChatHead) -> None:
        super().__init__(head)
        self._lines = _Lines(head.head)
        self._call: Call | None = None

    def content(self, **fields: Any) -> dict[str, Any]:
        return {"message": {**assistant_message(fields.pop("content", "")), **fields}}

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        read = self.message(0, answers[0])
        self._lines.ended(answers[0].finish_reason)
        fields: dict[str, Any] = {"content": read.content}
        if read.reasoning:
            fields["thinking"] = read.reasoning
        if read.calls:
            fields["tool_calls"] = [_call(call) for call in read.calls]
        return self._lines.last(self.content(**fields), usage, timing)

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        self._lines.ended(piece.finish_reason)
        contents = [content for part in self.read(index, piece) for content in self._contents(part)]
        if piece.finish_reason is not None:
            contents += self._finished_call()
        return b"".join(line(self._lines.line(content)) for content in contents)

    def _contents(self, part: Part) -> list[dict[str, Any]]:
        match part:
            case Content(text):
                return [*self._finished_call(), self.content(content=text)]
            case Reasoning(text):
                return [self.content(thinking=text)]
            case CallStart(name):
                finished = self._finished_call()
                self._call = Call(name)
                return finished
            case CallArguments(text):
                assert self._call is not None
                self._call.arguments += text
                return []

    def _finished_call(self) -> list[dict[str, Any]]:
        call, self._call = self._call, None
        return [] if call is None else [self.content(tool_calls=[_call(call)])]

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        return line(self._lines.last(self.content(), usage, timing))

    def error(self, error: ApiError) -> bytes:
        return line({"error": error.message})


class OllamaGenerate(OllamaChat):
    """The same with the text under `response`."""

    def content(self, **fields: Any) -> dict[str, Any]:
        return {"response": fields.pop("content", ""), **fields}


class OllamaRaw(AnswerWriter):
    """`raw`: the prompt goes to the model as it is."""

    media_type = NDJSON

    def __init__(
        self, head: Head, body: CompletionBody, texts: TokenTexts, prompts: Sequence[Prompt]
    ) -> None:
        self._lines = _Lines(head)

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        self._lines.ended(answers[0].finish_reason)
        return self._lines.last({"response": answers[0].text}, usage, timing)

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        self._lines.ended(piece.finish_reason)
        return line(self._lines.line({"response": piece.text})) if piece.text else b""

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        return line(self._lines.last({"response": ""}, usage, timing))

    def error(self, error: ApiError) -> bytes:
        return line({"error": error.message})
