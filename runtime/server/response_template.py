"""Answers read by the rules that a model brings: transformers' `response_template`.

A tokenizer_config.json may say how its model writes thoughts, text and calls, as marks and patterns
for transformers' own parser, which takes text as it arrives. Where it does, that is what is used;
the tables of this server (`reasoning.py`, `tool_formats.py`) are for models that bring nothing.
Source: transformers, utils/chat_parsing.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from qtool.runtime.server.call_readers import CallArguments, CallStart
from qtool.runtime.server.message_parser import Content, Part, Reasoning

logger = logging.getLogger("qtool.server")

# Templates on the Hub call thoughts by both names.
FIELDS: Mapping[str, type[Content] | type[Reasoning]] = {
    "content": Content,
    "reasoning_content": Reasoning,
    "thinking": Reasoning,
}
CALLS = "tool_calls"


def usable_template(template: object) -> Mapping[str, Any] | None:
    """The same if transformers can read it; else None, and why in the log."""
    if template is None:
        return None
    try:
        from transformers.utils.chat_parsing.response_templates import load_response_template

        load_response_template(template)
    except (ImportError, ValueError) as error:
        logger.warning("the tokenizer's response_template is not used: %s", error)
        return None
    assert isinstance(template, Mapping)
    return template


def reads_calls(template: Mapping[str, Any]) -> bool:
    return CALLS in template["fields"]


class ResponseReader:
    """
    prefix     the prompt, whose end may have opened the thoughts
    tools      as the chat template takes them; none: what looks like a call is text
    max_calls  further calls are dropped; None: all are taken
    """

    def __init__(
        self,
        template: Mapping[str, Any],
        prefix: str,
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        max_calls: int | None = None,
    ) -> None:
        from transformers.utils.chat_parsing import ResponseParser

        fields = dict(template["fields"])
        if not tools:
            fields.pop(CALLS, None)
        spec = {**template, "fields": fields}
        self._parser = ResponseParser(spec, prefix=prefix, tools=[dict(tool) for tool in tools])
        self._max_calls = max_calls
        self._num_calls = 0
        self._held = ""  # not given out yet: what a call that cannot be read is as text
        self._seen = 0  # of it, what the parser has told of
        self._broken = False
        self._last: type[Content] | type[Reasoning] | None = None
        self._blank = ""  # white space that is given out only if text follows

    def push(self, text: str) -> list[Part]:
        if self._broken:
            return [Content(text)] if text else []
        self._held += text
        try:
            return self._parts(self._parser.feed(text))
        except ValueError:
            return self._as_text()

    def finish(self) -> list[Part]:
        if self._broken:
            return []
        try:
            _, events = self._parser.finalize()
            return self._parts(events)
        except ValueError:
            return self._as_text()

    def _as_text(self) -> list[Part]:
        """A call that cannot be read is given out as it was written, and so is all after it."""
        self._broken = True
        return [Content(self._held)] if self._held else []

    def _told(self, text: str) -> None:
        """Of what is held, all up to this text has been told of."""
        self._seen = self._held.find(text, self._seen) + len(text)

    def _given(self) -> None:
        self._held, self._seen = self._held[self._seen :], 0

    def _parts(self, events: Sequence[Mapping[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for event in events:
            kind = FIELDS.get(event["field"])
            if event["type"] == "region_chunk":
                self._told(event["text"])
                if kind is not None:
                    self._given()
                    parts += self._text(kind, event["text"])
            elif event["type"] == "region_close":
                self._given()
                if event["field"] == CALLS:
                    parts += self._calls(event["value"])
        return parts

    def _text(self, kind: type[Content] | type[Reasoning], text: str) -> list[Part]:
        """Text without the line breaks that templates put around thoughts and calls."""
        if kind is not self._last:
            text, self._blank = text.lstrip(), ""
            if not text:
                return []
            self._last = kind
        text = self._blank + text
        stripped = text.rstrip()
        self._blank = text[len(stripped) :]
        return [kind(stripped)] if stripped else []

    def _calls(self, value: Any) -> list[Part]:
        parts: list[Part] = []
        for call in value if isinstance(value, list) else [value]:
            function = call.get("function", call) if isinstance(call, Mapping) else {}
            name, arguments = function.get("name"), function.get("arguments", {})
            self._num_calls += 1
            if not isinstance(name, str) or self._num_calls > (self._max_calls or self._num_calls):
                continue
            written = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
            parts += [CallStart(name), CallArguments(written)]
        return parts
