"""The request body of `/v1/chat/completions`: messages, tools, and what the answer should be.

It is also the form that the other chat dialects (Responses, Anthropic, Ollama) are turned into, so
that a conversation means the same whichever way it came in.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import orjson
from pydantic import Field, field_validator, model_validator

from qtool.runtime.server.parsing import INT32, Body, Int, shown
from qtool.runtime.server.protocol import MAX_LOGPROBS, GenerationBody

Role = Literal["system", "developer", "user", "assistant", "tool"]
TEXT_PARTS = ("text", "input_text", "output_text")
MAX_TOOLS = 1024
TOOL_NAME = r"^[A-Za-z0-9_.:/-]{1,128}$"


class CalledFunction(Body):
    name: str
    arguments: str = "{}"

    @field_validator("arguments", mode="before")
    @classmethod
    def _is_an_object(cls, value: object) -> object:
        """OpenAI sends a string of JSON, Ollama the object; templates want the object."""
        if isinstance(value, dict):
            return orjson.dumps(value).decode()
        if value in (None, ""):
            return "{}"
        if isinstance(value, str):
            try:
                parsed = orjson.loads(value)
            except orjson.JSONDecodeError as error:
                raise ValueError(f"is not valid JSON: {error}") from None
            if not isinstance(parsed, dict):
                raise ValueError("must be the JSON of an object")
        return value


class ToolCallBody(Body):
    id: str | None = None
    function: CalledFunction


class ChatMessage(Body):
    role: Role
    content: str | None = None
    name: str | None = None
    tool_calls: tuple[ToolCallBody, ...] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _role_is_offered(cls, value: object) -> object:
        if value == "function":
            raise ValueError('is the older form of `"tool"`; send that, with a tool_call_id')
        return value

    @field_validator("tool_calls", mode="before")
    @classmethod
    def _as_tuple(cls, value: object) -> object:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("content", mode="before")
    @classmethod
    def _join_parts(cls, value: object) -> object:
        """Text parts are joined by line breaks, as vLLM joins them; other kinds of parts are
        refused by name.
        """
        if not isinstance(value, list):
            return value
        texts: list[str] = []
        for position, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            text = part.get("refusal" if kind == "refusal" else "text") if kind else None
            if kind not in (*TEXT_PARTS, "refusal"):
                found = "a part without a type" if kind is None else f"a part of type {shown(kind)}"
                raise ValueError(f"holds {found} at position {position}, only text is supported")
            if not isinstance(text, str):
                raise ValueError(f"holds a text part without a text at position {position}")
            texts.append(text)
        return "\n".join(texts)


class FunctionBody(Body):
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    type: Literal["function"] = "function"
    function: FunctionBody

    def as_dict(self) -> dict[str, Any]:
        """For chat templates: the keys that transformers' own schema of tools has."""
        function: dict[str, Any] = {"name": self.function.name}
        if self.function.description is not None:
            function["description"] = self.function.description
        function["parameters"] = self.function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class ToolChoice(NamedTuple):
    """mode "required": at least one call; names: the functions that may be called."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...]


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[Int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[ToolBody], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    reasoning: dict[str, Any] | bool | None = None
    include_reasoning: bool | None = None
    echo: bool | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    add_special_tokens: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    unsupported: ClassVar[Mapping[str, tuple[object, ...]]] = {
        **GenerationBody.unsupported,
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "web_search_options": (),
    }

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs: true`")
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise ValueError(
                    "`continue_final_message` and `add_generation_prompt` exclude each other"
                )
            if self.messages[-1].role != "assistant":
                raise ValueError("`continue_final_message` needs a last message of the assistant")
        self.choice_of_tools  # noqa: B018 - raises where the choice fits no tool
        return self

    @property
    def max_new_tokens(self) -> int | None:
        """`max_completion_tokens` is the new name of `max_tokens` and wins where both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def num_top_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def choice_of_tools(self) -> ToolChoice:
        known = tuple(tool.function.name for tool in self.tools or ())
        choice = self.tool_choice
        if choice is None:
            return ToolChoice("auto" if known else "none", known)
        if isinstance(choice, str):
            return _mode(choice, known)
        kind = choice.get("type")
        if kind == "allowed_tools":
            allowed = choice.get("allowed_tools", choice)
            listed = allowed.get("tools") if isinstance(allowed, dict) else None
            if not isinstance(listed, list) or not listed:
                raise ValueError("tool_choice.allowed_tools.tools must list at least one tool")
            names = tuple(_named(entry, known) for entry in listed)
            return _mode(allowed.get("mode", "auto"), names)
        if kind in ("function", "tool", None):
            return ToolChoice("required", (_named(choice, known),))
        raise ValueError(f"tool_choice.type is {shown(kind)}, must be function or allowed_tools")


def _mode(word: object, names: tuple[str, ...]) -> ToolChoice:
    match word:
        case "none" | "auto":
            return ToolChoice(word if names else "none", names)
        case "required" | "any":
            if not names:
                raise ValueError(f"tool_choice is {word}, but there are no `tools`")
            return ToolChoice("required", names)
    raise ValueError(
        f"tool_choice is {shown(word)}, must be none, auto, required or a function's name"
    )


def _named(choice: object, known: tuple[str, ...]) -> str:
    function = choice.get("function", choice) if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        raise ValueError(f"tool_choice names no function (got {shown(choice)})")
    if name not in known:
        listed = ", ".join(known) or "none are given"
        raise ValueError(f"tool_choice names `{name:.128}`, the tools are: {listed}")
    return name
