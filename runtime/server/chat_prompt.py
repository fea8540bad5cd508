"""A conversation on its way to the model: the text of its prompt, how the answer will be read, and
what it is bound to.

    ChatBody -> PreparedChat(token ids, reader of answers, grammar)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from qtool.errors import UsageError
from qtool.runtime.engine.sampling_params import StructuredOutputsParams
from qtool.runtime.server.chat_protocol import ChatBody, ChatMessage, ToolBody
from qtool.runtime.server.errors import invalid
from qtool.runtime.server.harmony import HarmonyReader, is_harmony
from qtool.runtime.server.message_parser import MessageParser, MessageReader, PlainReader
from qtool.runtime.server.prompts import THREAD_ABOVE_CHARACTERS, encode, truncated
from qtool.runtime.server.protocol import TokenIds
from qtool.runtime.server.reasoning import ReasoningFormat, reasoning_format, reasoning_of
from qtool.runtime.server.response_template import ResponseReader, reads_calls
from qtool.runtime.server.service import Service
from qtool.runtime.server.structured import params, structured_outputs
from qtool.runtime.server.tool_formats import (
    FORCED,
    GENERIC,
    INSTRUCTIONS,
    ToolFormat,
    format_of,
    tool_format,
)
from qtool.runtime.server.tool_grammar import auto_grammar, forced_grammar, parameters_schema

# Arguments of transformers' apply_chat_template that are not variables of the template.
RESERVED_TEMPLATE_OPTIONS = frozenset(
    {
        "chat_template", "continue_final_message", "conversation", "documents", "max_length",
        "messages", "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors",
        "sanitize_control_tokens", "tokenize", "tokenizer_kwargs", "tools", "truncation",
    }
)  # fmt: skip
REASONING_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


@dataclass(frozen=True, slots=True)
class PreparedChat:
    """
    new_reader    a reader for one answer
    structured    what the answer must look like
    keep_special  the marks that the reader looks for are special tokens
    short_ids     ids of calls are nine letters, as Mistral's templates require
    stop          strings that end an answer, beside the request's own
    opening       the beginning of an answer that is to be gone on with
    """

    token_ids: TokenIds
    new_reader: Callable[[], MessageReader]
    structured: StructuredOutputsParams | None
    keep_special: bool = False
    short_ids: bool = False
    stop: tuple[str, ...] = ()
    opening: str = ""


async def prepare_chat(body: ChatBody, service: Service) -> PreparedChat:
    tokenizer, config = service.tokenizer, service.config
    choice = body.choice_of_tools
    offered = [tool for tool in body.tools or () if tool.function.name in choice.names]
    # With tool_choice none the model is still told of the tools, since the conversation may hold
    # calls of them; OpenAI does the same.
    told = list(body.tools or ()) if choice.mode == "none" else offered
    template = _template(body, service) or tokenizer.chat_template_for(tools=bool(told))
    known_format = tool_format(config.tool_call_parser) if config.tool_call_parser else None
    native = known_format or format_of(template)
    harmony = is_harmony(template)

    messages = _with_opening([_as_dict(message) for message in body.messages], service)
    if told and (template is None or "tools" not in template):
        messages = _with_instructions(messages, told)
    options = _template_options(body, service)
    if told:
        options["tools"] = [tool.as_dict() for tool in told]
    text = await _render(service, messages, options, slow="chat_template" in options)
    ids = await encode(tokenizer, text, add_special_tokens=bool(body.add_special_tokens))
    ids = truncated(ids, body.truncate_prompt_tokens, service.client.info)
    if not ids:
        raise invalid("the messages are empty: there is nothing to answer", param="messages")

    thoughts = (
        reasoning_format(config.reasoning_parser)
        if config.reasoning_parser
        else reasoning_of(template)
    )
    opened = thoughts is not None and text.rstrip().endswith(thoughts.open.rstrip())
    structured = structured_outputs(body)
    calls = choice.mode == "required" or (choice.mode == "auto" and config.enable_tools)
    form = (native or GENERIC) if calls and offered else None
    max_calls = 1 if body.parallel_tool_calls is False else None
    if form is not None and choice.mode == "required":
        if structured is not None:
            raise invalid(
                "`tool_choice` requires a call, which cannot have a `response_format` as well",
                param="response_format",
            )
        form = form if form.has_json_arguments and not harmony else FORCED
        max_calls = 1 if len(choice.names) == 1 else max_calls
        grammar = forced_grammar(
            form,
            offered,
            tokenizer.special_ids,
            max_calls=max_calls,
            open_reasoning=thoughts if opened else None,
        )
        structured = params({"grammar": grammar}, "tools")
    own_rules = None if config.tool_call_parser or config.reasoning_parser else _rules(service)
    if own_rules is not None and choice.mode != "required":
        # A syntax of which only these rules know is read, but cannot be enforced.
        form = native if form is not None and reads_calls(own_rules) else form
    if form is not None and choice.mode != "required" and structured is None and not harmony:
        auto = auto_grammar(
            form, offered, tokenizer.special_ids, max_calls=max_calls, reasoning=thoughts
        )
        structured = None if auto is None else params({"grammar": auto}, "tools")
    if harmony and form is not FORCED:
        return PreparedChat(
            ids, HarmonyReader, structured, keep_special=True, stop=tokenizer.chat_stop
        )
    if own_rules is not None and choice.mode != "required":
        tools = [tool.as_dict() for tool in offered] if calls else []
        return PreparedChat(
            ids,
            lambda: ResponseReader(own_rules, text, tools, max_calls=max_calls),
            structured,
            keep_special=True,
            stop=(*config.stop, *tokenizer.chat_stop),
            opening=_opening(body),
        )
    return PreparedChat(
        ids,
        _reader_factory(form, thoughts, opened, offered, max_calls),
        structured,
        keep_special=_has_special_marks(form, thoughts, service),
        short_ids=form is not None and form.short_ids,
        stop=(*config.stop, *(() if "chat_template" in options else tokenizer.chat_stop)),
        opening=_opening(body),
    )


def _rules(service: Service) -> Mapping[str, Any] | None:
    """The model's own rules for reading its answers, unless another template makes it write."""
    own = service.tokenizer.chat_template_origin == "model"
    return service.response_template if own else None


def _reader_factory(
    form: ToolFormat | None,
    thoughts: ReasoningFormat | None,
    opened: bool,
    tools: list[ToolBody],
    max_calls: int | None,
) -> Callable[[], MessageReader]:
    if form is None and thoughts is None:
        return PlainReader
    schemas = {tool.function.name: parameters_schema(tool) for tool in tools}
    return lambda: MessageParser(
        form, thoughts, schemas=schemas, starts_reasoning=opened, max_calls=max_calls
    )


def _has_special_marks(
    form: ToolFormat | None, thoughts: ReasoningFormat | None, service: Service
) -> bool:
    special = service.tokenizer.special_ids
    marks = [*((form.open, form.close, form.before) if form else ())]
    marks += [thoughts.open, thoughts.close] if thoughts else []
    return any(token in mark for mark in marks if mark for token in special)


def _opening(body: ChatBody) -> str:
    echoed = body.echo and body.continue_final_message
    return (body.messages[-1].content or "") if echoed else ""


def _template(body: ChatBody, service: Service) -> str | None:
    if body.chat_template is None:
        return None
    if not service.config.trust_request_template:
        raise invalid(
            "`chat_template` is not taken from requests by this server: it could run for ever "
            "(the operator allows it with --trust-request-chat-template)",
            param="chat_template",
            code="unsupported_parameter",
        )
    return body.chat_template


def _template_options(body: ChatBody, service: Service) -> dict[str, Any]:
    given = body.chat_template_kwargs or {}
    for name in sorted(RESERVED_TEMPLATE_OPTIONS.intersection(given)):
        where = f"chat_template_kwargs.{name}"
        raise invalid(f"`{where}` is not supported", param=where, code="unsupported_parameter")
    options = {**service.config.template_kwargs, **_effort(body), **given}
    if template := _template(body, service):
        options["chat_template"] = template
    if body.documents:
        options["documents"] = body.documents
    if body.add_generation_prompt is not None:
        options["add_generation_prompt"] = body.add_generation_prompt
    if body.continue_final_message:
        options |= {"continue_final_message": True, "add_generation_prompt": False}
    return options


def _effort(body: ChatBody) -> dict[str, Any]:
    """How much to think, as the variables that templates know."""
    reasoning = body.reasoning
    nested = reasoning if isinstance(reasoning, dict) else {}
    effort = body.reasoning_effort or nested.get("effort")
    enabled = reasoning if isinstance(reasoning, bool) else nested.get("enabled")
    if effort is None:
        return {} if enabled is None else {"enable_thinking": bool(enabled)}
    if effort not in REASONING_EFFORTS:
        listed = ", ".join(REASONING_EFFORTS)
        raise invalid(
            f"`reasoning_effort` must be one of {listed} (got {orjson.dumps(effort).decode()})",
            param="reasoning_effort",
        )
    thinks = effort != "none"
    return {"enable_thinking": thinks, **({"reasoning_effort": effort} if thinks else {})}


async def _render(
    service: Service, messages: list[dict[str, Any]], options: dict[str, Any], *, slow: bool
) -> str:
    def render() -> str:
        return service.tokenizer.apply_chat_template(messages, **options)

    try:
        size = sum(len(message["content"] or "") for message in messages)
        slow = slow or not service.tokenizer.renders_at_once
        if slow or size > THREAD_ABOVE_CHARACTERS:
            return await asyncio.to_thread(render)
        return render()
    except UsageError as error:
        raise invalid(error.message, param="messages") from None


def _with_opening(messages: list[dict[str, Any]], service: Service) -> list[dict[str, Any]]:
    """What the operator puts before every conversation; a client's system prompt wins."""
    config = service.config
    has_system = messages[0]["role"] == "system"
    opening = [] if has_system or not config.system else [_system(config.system)]
    own = messages[:1] if has_system else []
    return [*opening, *own, *map(dict, config.examples), *messages[len(own) :]]


def _system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    # "developer" is OpenAI's newer word for "system", which is the one that models' templates know.
    role = "system" if message.role == "developer" else message.role
    fields: dict[str, Any] = {"role": role, "content": message.content or ""}
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    if thoughts := message.reasoning or message.reasoning_content:
        fields |= {"reasoning": thoughts, "reasoning_content": thoughts}
    if message.tool_calls:
        fields["tool_calls"] = [
            {
                "id": call.id or f"call{position:05d}",
                "type": "function",
                "function": {
                    "name": call.function.name,
                    "arguments": orjson.loads(call.function.arguments),
                },
            }
            for position, call in enumerate(message.tool_calls)
        ]
    return fields


def _with_instructions(
    messages: list[dict[str, Any]], tools: list[ToolBody]
) -> list[dict[str, Any]]:
    """The tools in the system prompt, and calls as text, for templates that know of neither."""
    listed = "\n".join(orjson.dumps(tool.as_dict()["function"]).decode() for tool in tools)
    told = INSTRUCTIONS + listed
    written = [_with_calls_as_text(message) for message in messages]
    if written[0]["role"] == "system":
        first = {**written[0], "content": f"{written[0]['content']}\n\n{told}"}
        return [first, *written[1:]]
    return [{"role": "system", "content": told}, *written]


def _with_calls_as_text(message: dict[str, Any]) -> dict[str, Any]:
    if message["role"] == "tool":
        return {
            "role": "user",
            "content": f"<tool_response>\n{message['content']}\n</tool_response>",
        }
    calls = message.get("tool_calls")
    if not calls:
        return message
    texts = [
        f"<tool_call>\n{orjson.dumps(call['function']).decode()}\n</tool_call>" for call in calls
    ]
    content = "\n".join(text for text in (message["content"], *texts) if text)
    return {"role": message["role"], "content": content}
