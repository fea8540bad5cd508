"""Answers of gpt-oss, which are several messages in channels (OpenAI's "harmony" format).

    <|channel|>analysis<|message|>thoughts<|end|>
    <|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>{...}<|call|>
    <|start|>assistant<|channel|>final<|message|>the answer<|return|>

Source: github.com/openai/harmony, docs/format.md.
"""

from __future__ import annotations

import re

from qtool.runtime.server.call_readers import CallArguments, CallStart
from qtool.runtime.server.message_parser import (
    Content,
    Part,
    Reasoning,
    possible_marker_length,
)

MESSAGE = "<|message|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>")
_RECIPIENT = re.compile(r"to=(?:functions\.)?([\w.\-]+)")


def is_harmony(chat_template: str | None) -> bool:
    template = chat_template or ""
    return "<|channel|>" in template and MESSAGE in template


class HarmonyReader:
    def __init__(self) -> None:
        self._held = ""
        self._kind: type[Content] | type[Reasoning] | type[CallArguments] | None = None

    def push(self, text: str) -> list[Part]:
        self._held += text
        parts: list[Part] = []
        while self._held and self._advance(parts):
            pass
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        if self._kind is None:
            header, found, rest = self._held.partition(MESSAGE)
            if not found:
                return False
            self._held = rest
            self._begin(header, parts)
            return True
        ends = [(start, end) for end in ENDS if (start := self._held.find(end)) >= 0]
        if ends:
            start, end = min(ends)
            self._give(self._held[:start], parts)
            self._held, self._kind = self._held[start + len(end) :], None
            return True
        ready = len(self._held) - possible_marker_length(self._held, ENDS)
        self._give(self._held[:ready], parts)
        self._held = self._held[ready:]
        return False

    def _begin(self, header: str, parts: list[Part]) -> None:
        recipient = _RECIPIENT.search(header)
        if recipient:
            parts.append(CallStart(recipient[1]))
            self._kind = CallArguments
        else:
            self._kind = Reasoning if "analysis" in header else Content

    def _give(self, text: str, parts: list[Part]) -> None:
        if text and self._kind is not None:
            parts.append(self._kind(text))

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._kind is None:
            # Without any channel the model has answered in plain text.
            if self._held and "<|" not in self._held:
                parts.append(Content(self._held))
        else:
            self._give(self._held, parts)
        self._held = ""
        return parts
