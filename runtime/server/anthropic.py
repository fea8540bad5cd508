"""Anthropic's Messages API: `/v1/messages` and `/v1/messages/count_tokens`.

A message is a list of blocks: text, thoughts, calls of tools (`tool_use`) and their results, which
come back in a message of the user. A stream opens and closes each block by its index. Source:
docs.anthropic.com, "Messages" and "Streaming messages".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import Field

from qtool.runtime.server.answers import Timing, Usage
from qtool.runtime.server.call_readers import CallArguments, CallStart
from qtool.runtime.server.chat_exchange import ChatExchange, ChatHead, ChatWriter
from qtool.runtime.server.chat_prompt import prepare_chat
from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.errors import ApiError, invalid
from qtool.runtime.server.exchange import json_response
from qtool.runtime.server.generation import Answer, Piece
from qtool.runtime.server.message_parser import Content, Part, Reasoning
from qtool.runtime.server.openai import body_schema, parsed_body
from qtool.runtime.server.parsing import INT32, Body, Int, shown, validated
from qtool.runtime.server.service import Service

STOP_REASONS = {"length": "max_tokens", "tool_calls": "tool_use", "stop": "end_turn"}
ERROR_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


class AnthropicTool(Body):
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None


class AnthropicChoice(Body):
    type: str
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class MessagesBody(Body):
    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    max_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    system: str | list[dict[str, Any]] | None = None
    stop_sequences: list[str] | None = None
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=0)] | None = None
    tools: list[AnthropicTool] | None = None
    tool_choice: AnthropicChoice | None = None
    thinking: dict[str, Any] | None = None
    output_config: dict[str, Any] | None = None
    output_format: dict[str, Any] | None = None

    def as_chat(self) -> ChatBody:
        messages: list[dict[str, Any]] = []
        if self.system:
            messages.append({"role": "system", "content": _text(self.system, "system")})
        for position, message in enumerate(self.messages):
            messages += _openai_messages(message, f"messages[{position}]")
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_tokens,
            "stop": self.stop_sequences or None,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                    },
                }
                for tool in self.tools or ()
            ],
            "tool_choice": self._choice(),
        }
        if self.tool_choice is not None and self.tool_choice.disable_parallel_tool_use:
            fields["parallel_tool_calls"] = False
        if self.thinking is not None:
            fields["reasoning"] = self.thinking.get("type") != "disabled"
        form = self.output_format or (self.output_config or {}).get("format")
        if isinstance(form, dict) and isinstance(form.get("schema"), dict):
            fields["guided_json"] = form["schema"]
        return validated(ChatBody, fields)

    def _choice(self) -> Any:
        choice = self.tool_choice
        if choice is None:
            return None
        if choice.type == "tool":
            return {"type": "function", "function": {"name": choice.name}}
        if choice.type not in ("auto", "any", "none"):
            raise invalid(
                f"`tool_choice.type` must be auto, any, tool or none (got {shown(choice.type)})",
                param="tool_choice.type",
            )
        return choice.type


def _text(content: Any, where: str) -> str:
    """Text, or a list of blocks of text."""
    if isinstance(content, str):
        return content
    blocks = content if isinstance(content, list) else []
    texts = []
    for block in blocks:
        kind = block.get("type") if isinstance(block, dict) else None
        if kind != "text" or not isinstance(block.get("text"), str):
            raise invalid(f"`{where}` holds a block of type {shown(kind)}; only text is supported")
        texts.append(block["text"])
    return "\n".join(texts)


def _openai_messages(message: dict[str, Any], where: str) -> list[dict[str, Any]]:
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"`{where}.role` must be user or assistant (got {shown(role)})", param=where)
    if isinstance(content, str):
        return [{"role": role, "content": content}]
    if not isinstance(content, list):
        raise invalid(f"`{where}.content` must be a string or a list of blocks", param=where)
    found: list[dict[str, Any]] = []
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[dict[str, Any]] = []
    for place, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        match kind:
            case "text":
                texts.append(_text([block], f"{where}.content[{place}]"))
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                pass
            case "tool_use":
                function = {"name": block.get("name"), "arguments": block.get("input") or {}}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                inner = f"{where}.content[{place}].content"
                found.append(
                    {
                        "role": "tool",
                        "tool_call_id": block.get("tool_use_id"),
                        "content": _text(block.get("content") or "", inner),
                    }
                )
            case _:
                raise invalid(
                    f"`{where}.content[{place}]` is a block of type {shown(kind)}; text, thinking, "
                    "tool_use and tool_result are supported",
                    param=f"{where}.content",
                )
    if texts or calls or thoughts or not found:
        own: dict[str, Any] = {"role": role, "content": "\n".join(texts)}
        if calls:
            own["tool_calls"] = calls
        if thoughts:
            own["reasoning"] = "\n".join(thoughts)
        found.append(own)
    return found


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/messages", openapi_extra=body_schema(MessagesBody))
    async def messages(request: Request) -> Response:
        body = await parsed_body(service, MessagesBody, request)
        if body.max_tokens is None:
            raise invalid("`max_tokens` is required", param="max_tokens")
        exchange = ChatExchange(service, body.as_chat(), AnthropicChat, id_prefix="msg")
        return await exchange.response(request)

    @router.post("/v1/messages/count_tokens", openapi_extra=body_schema(MessagesBody))
    async def count_tokens(request: Request) -> Response:
        body = await parsed_body(service, MessagesBody, request)
        view = service.named(body.model)
        view.model_name(body.model)
        chat = await prepare_chat(body.as_chat(), view)
        return json_response({"input_tokens": len(chat.token_ids)})

    return router


def anthropic_error(error: ApiError) -> dict[str, Any]:
    kind = ERROR_TYPES.get(error.status, "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def _event(name: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (name.encode(), orjson.dumps({"type": name, **fields}))


class AnthropicChat(ChatWriter):
    def __init__(self, head: ChatHead) -> None:
        super().__init__(head)
        self._block = -1
        self._open: str | None = None
        self._stopped: tuple[str, str | None] = ("end_turn", None)

    def _message(self, content: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        return {
            "id": self.head.id,
            "type": "message",
            "role": "assistant",
            "model": self.head.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }

    def document(self, answers: Sequence[Answer], usage: Usage, timing: Timing) -> dict[str, Any]:
        answer = answers[0]
        read = self.message(0, answer)
        content: list[dict[str, Any]] = []
        if read.reasoning:
            content.append({"type": "thinking", "thinking": read.reasoning, "signature": ""})
        if read.content or not read.calls:
            content.append({"type": "text", "text": read.content})
        for call in read.calls:
            content.append({**self._tool_use(call.name), "input": _input(call.arguments)})
        reason, sequence = self._reason(answer)
        ending = {"stop_reason": reason, "stop_sequence": sequence}
        return {**self._message(content, usage), **ending}

    def _tool_use(self, name: str) -> dict[str, Any]:
        return {"type": "tool_use", "id": f"toolu_{self.new_call_id()}", "name": name, "input": {}}

    def _reason(self, answer: Answer | Piece) -> tuple[str, str | None]:
        if isinstance(answer.stop_reason, str) and answer.stop_reason in self.body.stop_strings:
            return "stop_sequence", answer.stop_reason
        return STOP_REASONS[self.finish_reason(0, answer) or "stop"], None

    def opening(self, usage: Usage) -> bytes:
        return _event("message_start", message=self._message([], usage)) + _event("ping")

    def piece(self, index: int, piece: Piece, usage: Usage) -> bytes:
        events = [self._events(part) for part in self.read(index, piece)]
        if piece.finish_reason is not None:
            if self._block < 0:
                events.append(self._begin("text", {"type": "text", "text": ""}))
            events.append(self._end())
            self._stopped = self._reason(piece)
        return b"".join(events)

    def _events(self, part: Part) -> bytes:
        match part:
            case Content(text):
                if not text:
                    return b""
                begin = self._begin("text", {"type": "text", "text": ""})
                return begin + self._delta({"type": "text_delta", "text": text})
            case Reasoning(text):
                begin = self._begin(
                    "thinking", {"type": "thinking", "thinking": "", "signature": ""}
                )
                return begin + self._delta({"type": "thinking_delta", "thinking": text})
            case CallStart(name):
                return self._end() + self._begin("tool_use", self._tool_use(name))
            case CallArguments(text):
                return self._delta({"type": "input_json_delta", "partial_json": text})

    def _begin(self, kind: str, block: dict[str, Any]) -> bytes:
        if self._open == kind:
            return b""
        ended = self._end()
        self._block += 1
        self._open = kind
        return ended + _event("content_block_start", index=self._block, content_block=block)

    def _end(self) -> bytes:
        if self._open is None:
            return b""
        self._open = None
        return _event("content_block_stop", index=self._block)

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return _event("content_block_delta", index=self._block, delta=delta)

    def closing(self, usage: Usage, timing: Timing) -> bytes:
        reason, sequence = self._stopped
        delta = {"stop_reason": reason, "stop_sequence": sequence}
        return _event("message_delta", delta=delta, usage=_usage(usage)) + _event("message_stop")

    def error(self, error: ApiError) -> bytes:
        return b"event: error\ndata: %b\n\n" % orjson.dumps(anthropic_error(error))


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens - usage.cached_tokens,
        "cache_read_input_tokens": usage.cached_tokens,
        "cache_creation_input_tokens": 0,
        "output_tokens": usage.completion_tokens,
    }


def _input(arguments: str) -> Any:
    try:
        return orjson.loads(arguments or "{}")
    except orjson.JSONDecodeError:  # cut short by max_tokens
        return {}
