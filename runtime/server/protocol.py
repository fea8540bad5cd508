"""The request bodies of the OpenAI API, as far as this server understands them.

Three kinds of fields. Those below are read and checked. Those in `UNSUPPORTED_*` are known, would
change the answer, and are not offered: any value of them but the neutral ones is refused by name,
because an answer that silently lacks what was asked for is worse than none. All others are
ignored: openai-python's `extra_body`, Open WebUI and agents add fields of their own, and vLLM
lets them pass too.

Reference: the OpenAI API reference for `completions` and `chat/completions`, and vLLM's
extensions of them (`top_k`, `min_p`, `min_tokens`, `ignore_eos`, `stop_token_ids`,
`include_stop_str_in_output`, `priority`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from qtool.errors import closest
from qtool.runtime.server.errors import ApiError, invalid

INT64 = 2**63
INT32 = 2**31
MAX_STOP_STRINGS = 128
UTF8_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def _whole_float_to_int(value: object) -> object:
    # Sliders and JavaScript send 512.0 where 512 is meant; 512.5 stays an error.
    return int(value) if isinstance(value, float) and value.is_integer() else value


Int = Annotated[int, BeforeValidator(_whole_float_to_int)]
TokenIds = tuple[int, ...]


class _Body(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class StreamOptions(_Body):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class GenerationBody(_Body):
    """What completions and chat share. None means "not given": the model's own default, then
    OpenAI's, applies.
    """

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    min_tokens: Annotated[Int, Field(ge=0, lt=INT32)] | None = None
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Int, Field(ge=-1, lt=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: Annotated[Int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[Int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    priority: Annotated[Int, Field(ge=-INT32, lt=INT32)] | None = None

    @field_validator("stop", mode="before")
    @classmethod
    def _stop_is_text(cls, value: object) -> object:
        strings = [value] if isinstance(value, str) else value
        if strings is None:
            return None
        if not isinstance(strings, list) or not all(isinstance(text, str) for text in strings):
            raise ValueError("must be a string or a list of strings")
        if len(strings) > MAX_STOP_STRINGS:
            raise ValueError(f"has {len(strings)} strings, at most {MAX_STOP_STRINGS} are taken")
        if "" in strings:
            raise ValueError("holds an empty string, which would stop at once")
        return value

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        options = self.stream_options
        return options is not None and bool(options.include_usage or options.continuous_usage_stats)

    @property
    def usage_on_every_chunk(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.continuous_usage_stats)


PromptInput = str | list[str] | list[int] | list[list[int]]


class CompletionBody(GenerationBody):
    """`POST /v1/completions`. Whatever form the prompt came in, it is one entry a prompt here."""

    prompt: tuple[str | TokenIds, ...]
    add_special_tokens: bool | None = None

    @field_validator("prompt", mode="plain", json_schema_input_type=PromptInput)
    @classmethod
    def _one_entry_a_prompt(cls, value: object) -> tuple[str | TokenIds, ...]:
        # By hand: a union of four types reports all four failures, at every position of the list.
        match value:
            case str():
                return (value,)
            case []:
                raise ValueError("is an empty list")
            case list() if _are_token_ids(value):
                return (tuple(value),)
            case list() if all(isinstance(prompt, str) for prompt in value):
                return tuple(value)
            case list() if all(isinstance(prompt, list) and prompt for prompt in value):
                if all(_are_token_ids(prompt) for prompt in value):
                    return tuple(tuple(prompt) for prompt in value)
        raise ValueError(
            "must be a string, a list of strings, a list of token ids, or a list of such lists"
        )


def _are_token_ids(items: list[Any]) -> bool:
    return all(isinstance(item, int) and not isinstance(item, bool) for item in items)


Role = Literal["system", "developer", "user", "assistant"]


class TextPart(_Body):
    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    role: Role
    content: str | None = None
    name: str | None = None

    @field_validator("role", mode="before")
    @classmethod
    def _role_is_offered(cls, value: object) -> object:
        if value in ("tool", "function"):
            raise ValueError("is for tool calls, which are not supported in this version")
        return value

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
            if kind != "text":
                found = (
                    "a part without a type" if kind is None else f"a part of type {_shown(kind)}"
                )
                raise ValueError(f"holds {found} at position {position}, only text is supported")
            texts.append(TextPart.model_validate(part).text)
        return "\n".join(texts)


class ChatBody(GenerationBody):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[Int, Field(ge=1, lt=INT32)] | None = None
    add_generation_prompt: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def max_new_tokens(self) -> int | None:
        """`max_completion_tokens` is the new name of `max_tokens` and wins where both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


# Known fields that would change the answer -> the values of them that change nothing (null always
# does not).
UNSUPPORTED: Mapping[str, tuple[object, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "use_beam_search": (False,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "logit_bias": ({},),
    "bad_words": ([],),
    "allowed_token_ids": (),
    "prompt_logprobs": (),
    "truncate_prompt_tokens": (),
    "skip_special_tokens": (True,),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "grammar": ("",),
    "json_schema": (),
    "logits_processors": ([],),
    "echo": (False,),
}
UNSUPPORTED_IN_COMPLETIONS: Mapping[str, tuple[object, ...]] = {
    **UNSUPPORTED,
    "suffix": ("",),
    "logprobs": (False,),  # 0 is not neutral here: it asks for the logprob of each chosen token
    "prompt_embeds": (),
}
UNSUPPORTED_IN_CHAT: Mapping[str, tuple[object, ...]] = {
    **UNSUPPORTED,
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),  # without tools both mean "answer in text"
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
    "documents": ([],),
    "chat_template": (),
    "continue_final_message": (False,),
    "web_search_options": (),
}

# pydantic's words for what a client can only read with Python in mind.
PLAINER = {
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "dict_type": "must be an object",
    "list_type": "must be an array",
    "too_short": "must not be empty",
}

SomeBody = TypeVar("SomeBody", bound=GenerationBody)


def parse(
    body_type: type[SomeBody], raw: bytes, unsupported: Mapping[str, tuple[object, ...]]
) -> SomeBody:
    """One request body from its bytes, whatever Content-Type came with them; ApiError 400 for
    anything wrong.
    """
    try:
        document = orjson.loads(raw.removeprefix(UTF8_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError as error:
        found = (
            f"the body begins {raw[:40].decode('utf-8', 'replace')!r}"
            if raw
            else "the body is empty"
        )
        raise invalid(f"The request body is not valid JSON: {error}; {found}") from None
    if not isinstance(document, dict):
        raise invalid(f"The request body must be a JSON object, not {_json_kind(document)}")
    refuse_unsupported(document, unsupported)
    try:
        return body_type.model_validate(document)
    except ValidationError as error:
        raise _first_mistake(error, document, body_type) from None


def refuse_unsupported(
    document: Mapping[str, Any], unsupported: Mapping[str, tuple[object, ...]]
) -> None:
    for field, neutral in unsupported.items():
        value = document.get(field)
        if value is None or any(_same(value, allowed) for allowed in neutral):
            continue
        message = f"`{field}` is not supported in this version (got {_shown(value)})"
        if neutral:
            choices = " or ".join(orjson.dumps(allowed).decode() for allowed in neutral)
            message += f"; leave it out or send {choices}"
        raise invalid(message, param=field, code="unsupported_parameter")
    for position, message_body in enumerate(_dicts(document.get("messages"))):
        for field in ("tool_calls", "function_call"):
            if message_body.get(field):
                where = f"messages[{position}].{field}"
                raise invalid(
                    f"`{where}` is not supported in this version: tool calls are not offered",
                    param=where,
                    code="unsupported_parameter",
                )


def _dicts(value: object) -> list[dict[str, Any]]:
    return (
        [item if isinstance(item, dict) else {} for item in value]
        if isinstance(value, list)
        else []
    )


def _same(value: object, allowed: object) -> bool:
    # True == 1 in Python; in a request body they are different answers to different questions.
    return isinstance(value, bool) == isinstance(allowed, bool) and value == allowed


def _first_mistake(
    error: ValidationError, document: Mapping[str, Any], body_type: type[_Body]
) -> ApiError:
    """The first thing wrong, in one line: where, what rule, what was found."""
    first = error.errors(include_url=False, include_context=False)[0]
    path = [
        part for part in first["loc"] if isinstance(part, int) or part not in ("str", "list[str]")
    ]
    where = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(
        "."
    )
    if first["type"] == "missing":
        message = f"`{where}` is required"
        if where in body_type.model_fields:
            guess = closest(where, [key for key in document if key not in body_type.model_fields])
            message += f" (the body has `{guess}`: did you mean `{where}`?)" if guess else ""
    else:
        rule = PLAINER.get(first["type"]) or first["msg"].removeprefix("Value error, ")
        rule = rule.replace("Input should be", "must be")
        message = f"`{where}` {rule} (got {_shown(first['input'])})"
    return invalid(message, param=where)


def _shown(value: object, limit: int = 80) -> str:
    try:
        text = orjson.dumps(value).decode()
    except TypeError:
        text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _json_kind(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
