"""The body of `/v1/responses`, and its items turned into messages.

Items are what a conversation is made of there: messages, calls of functions and their outputs, and
reasoning. A response can follow an earlier one by its id (`previous_response_id`), whose items are
kept by the server for a while. Source: the OpenAI API reference, "Responses".
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from qtool.runtime.server.chat_protocol import ChatBody
from qtool.runtime.server.errors import ApiError, invalid
from qtool.runtime.server.parsing import INT32, Body, Int, shown, validated
from qtool.runtime.server.protocol import MAX_LOGPROBS

Items = list[dict[str, Any]]


class ResponsesBody(Body):
    model: str | None = None
    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    stream: bool | None = None
    store: bool | None = None
    previous_response_id: str | None = None
    metadata: dict[str, Any] | None = None
    include: list[str] | None = None
    user: str | None = None

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "background": (False,),
        "conversation": (),
        "prompt": (),
    }

    @property
    def items(self) -> Items:
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return self.input

    def as_chat(self, earlier: Items) -> ChatBody:
        messages: Items = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        messages += messages_of([*earlier, *self.items])
        fields: dict[str, Any] = {
            "model": self.model,
            "messages": messages,
            "max_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": self.stream,
            "tools": [_tool(tool, place) for place, tool in enumerate(self.tools or ())],
            "tool_choice": self.tool_choice,
            "parallel_tool_calls": self.parallel_tool_calls,
            "reasoning_effort": (self.reasoning or {}).get("effort"),
            "response_format": self._format(),
        }
        if self.top_logprobs is not None or "message.output_text.logprobs" in (self.include or ()):
            fields |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        return validated(ChatBody, fields)

    def _format(self) -> dict[str, Any] | None:
        form = (self.text or {}).get("format")
        return form if isinstance(form, dict) else None


def _tool(tool: dict[str, Any], place: int) -> dict[str, Any]:
    if tool.get("type", "function") != "function":
        raise invalid(
            f"`tools[{place}]` is of type {shown(tool.get('type'))}; this server runs no tools of "
            "its own, only functions are supported",
            param=f"tools[{place}].type",
            code="unsupported_parameter",
        )
    return {"type": "function", "function": tool.get("function", tool)}


def messages_of(items: Items) -> Items:
    """Calls that follow each other belong to one message of the assistant, with what it said."""
    messages: Items = []
    for place, item in enumerate(items):
        kind = item.get("type", "message")
        match kind:
            case "message":
                message = {"role": item.get("role"), "content": item.get("content")}
                thoughts = _take_thoughts(messages) if item.get("role") == "assistant" else None
                messages.append({**message, **thoughts} if thoughts else message)
            case "function_call":
                if not messages or messages[-1]["role"] != "assistant":
                    messages.append({"role": "assistant", "content": ""})
                function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
                call = {"id": item.get("call_id"), "type": "function", "function": function}
                messages[-1].setdefault("tool_calls", []).append(call)
            case "function_call_output":
                output = item.get("output")
                messages.append(
                    {"role": "tool", "tool_call_id": item.get("call_id"), "content": output}
                )
            case "reasoning":
                parts = item.get("content") or item.get("summary") or []
                text = "\n".join(str(part.get("text", "")) for part in parts)
                messages.append({"role": "assistant", "content": "", "reasoning": text})
            case _:
                raise invalid(
                    f"`input[{place}]` is of type {shown(kind)}; message, function_call, "
                    "function_call_output and reasoning are supported",
                    param=f"input[{place}].type",
                )
    return messages


def _take_thoughts(messages: Items) -> dict[str, Any] | None:
    """Thoughts without an answer yet, which the next message of the assistant gives."""
    if messages and messages[-1].keys() == {"role", "content", "reasoning"}:
        return {"reasoning": messages.pop()["reasoning"]}
    return None


class ResponseStore:
    """The newest responses with the items that led to them, up to a number of characters."""

    def __init__(self, max_characters: int = 64_000_000) -> None:
        self._kept: OrderedDict[str, tuple[dict[str, Any], Items, int]] = OrderedDict()
        self._size = 0
        self._max_characters = max_characters

    def keep(self, response: dict[str, Any], items: Items) -> None:
        size = len(str(items)) + len(str(response))
        self._kept[response["id"]] = (response, items, size)
        self._size += size
        while self._size > self._max_characters and self._kept:
            self._size -= self._kept.popitem(last=False)[1][2]

    def response(self, response_id: str) -> dict[str, Any]:
        return self._find(response_id)[0]

    def items(self, response_id: str) -> Items:
        """The whole conversation up to and with that response."""
        return self._find(response_id)[1]

    def forget(self, response_id: str) -> None:
        self._find(response_id)
        self._size -= self._kept.pop(response_id)[2]

    def _find(self, response_id: str) -> tuple[dict[str, Any], Items, int]:
        if response_id not in self._kept:
            raise ApiError(
                404,
                f"Response `{response_id:.128}` is not here: it was not stored, or others have "
                "taken its place",
                type="not_found_error",
                code="response_not_found",
            )
        return self._kept[response_id]
