"""The text of an answer, split into thoughts, answer and tool calls as it arrives.

    "<think>Hm.</think>Sure.<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>"
     -> Reasoning("Hm.")  Content("Sure.")  CallStart("f")  CallArguments('{"x": 1}')

Text is held back only while it may be the beginning of a mark. Line breaks around thoughts and
calls, which templates put there, are no part of the answer. Text that looked like a call and is
none is given out as it was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from qtool.runtime.server.call_readers import (
    CallArguments,
    CallReader,
    CallStart,
    NotACall,
    reader_for,
)
from qtool.runtime.server.reasoning import ReasoningFormat
from qtool.runtime.server.tool_formats import ToolFormat


class Content(NamedTuple):
    text: str


class Reasoning(NamedTuple):
    text: str


Part = Content | Reasoning | CallStart | CallArguments


class MessageReader(Protocol):
    def push(self, text: str) -> list[Part]: ...

    def finish(self) -> list[Part]: ...


@dataclass(slots=True)
class Call:
    name: str
    arguments: str = ""


@dataclass(slots=True)
class ParsedMessage:
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, part: Part) -> None:
        match part:
            case Content(text):
                self.content += text
            case Reasoning(text):
                self.reasoning += text
            case CallStart(name):
                self.calls.append(Call(name))
            case CallArguments(text):
                self.calls[-1].arguments += text


class PlainReader:
    """For models and requests without tools and thoughts: all is content, at once."""

    def push(self, text: str) -> list[Part]:
        return [Content(text)]

    def finish(self) -> list[Part]:
        return []


class MessageParser:
    """
    schemas           the parameters of each tool, for syntaxes that write values without types
    starts_reasoning  the prompt ends with the mark that opens the thoughts
    max_calls         further calls are dropped; None: all are taken
    """

    def __init__(
        self,
        tools: ToolFormat | None,
        reasoning: ReasoningFormat | None,
        *,
        schemas: Mapping[str, Mapping[str, Any]] | None = None,
        starts_reasoning: bool = False,
        max_calls: int | None = None,
    ) -> None:
        self._tools = tools
        self._reasoning = reasoning
        self._schemas = schemas or {}
        self._mode: Literal["text", "reasoning", "call", "closing"] = (
            "reasoning" if starts_reasoning else "text"
        )
        self._held = ""
        self._blank = ""  # white space that is given out only if text follows
        self._at_start = True
        self._skip_blank = starts_reasoning
        self._reader: CallReader | None = None
        self._call_text = ""
        self._num_calls = 0
        self._max_calls = max_calls
        self._parts: list[Part] = []
        self._text_markers = tuple(
            marker
            for marker in (
                *(tools.markers if tools else ()),
                *((reasoning.open, reasoning.close) if reasoning else ()),
            )
            if marker
        )

    def push(self, text: str) -> list[Part]:
        self._held += text
        while self._held and self._advance():
            pass
        parts, self._parts = self._parts, []
        return parts

    def finish(self) -> list[Part]:
        """What is still held when no more text comes."""
        if self._mode == "call":
            assert self._reader is not None
            try:
                self._take(self._reader.finish())
            except NotACall:
                self._content(self._call_text)
        elif self._mode == "reasoning":
            self._emit(Reasoning(self._held))
        elif self._held.strip() or self._mode == "text":
            self._content(self._held)
        self._held = ""
        if self._blank and not self._num_calls and self._mode == "text":
            self._parts.append(Content(self._blank))
        parts, self._parts = self._parts, []
        return parts

    def _advance(self) -> bool:
        """One step; False when more text is needed."""
        match self._mode:
            case "text":
                return self._read_text()
            case "reasoning":
                return self._read_reasoning()
            case "call":
                return self._read_call()
            case "closing":
                return self._read_close()

    def _read_text(self) -> bool:
        tools = self._tools
        if self._at_start and tools is not None and tools.bare:
            stripped = self._held.lstrip(" \t\r\n;")
            if not stripped:
                return False
            begins = "[" if tools.body in ("list", "pythonic") else "{"
            if stripped[0] == begins:
                self._held = stripped
                self._begin_call("")
                return True
        start, marker = _first(self._held, self._text_markers)
        if not marker:
            keep = possible_marker_length(self._held, self._text_markers)
            if keep == len(self._held):
                return False
            ready, self._held = _split(self._held, len(self._held) - keep)
            self._content(ready)
            return False
        before, self._held = self._held[:start], self._held[start + len(marker) :]
        self._content(before)
        self._blank = ""
        if tools is not None and marker == tools.open:
            self._begin_call(marker)
        elif self._reasoning is not None and marker == self._reasoning.open:
            self._mode, self._skip_blank = "reasoning", True
        else:
            self._skip_blank = True
        return True

    def _read_reasoning(self) -> bool:
        assert self._reasoning is not None
        close = self._reasoning.close
        start = self._held.find(close)
        if start < 0:
            keep = possible_marker_length(self._held, (close,))
            ready, self._held = _split(self._held, len(self._held) - keep)
            self._emit(Reasoning(ready))
            return False
        self._emit(Reasoning(self._held[:start]))
        self._held = self._held[start + len(close) :]
        self._mode, self._skip_blank, self._blank = "text", True, ""
        return True

    def _begin_call(self, marker: str) -> None:
        assert self._tools is not None
        self._mode, self._call_text = "call", marker
        self._reader = reader_for(self._tools, self._schemas)

    def _read_call(self) -> bool:
        assert self._reader is not None
        assert self._tools is not None
        text, self._held = self._held, ""
        self._call_text += text
        try:
            events = self._reader.push(text)
        except NotACall:
            self._mode, self._at_start = "text", False
            self._content(self._call_text)
            return False
        self._take(events)
        if self._reader.rest is None:
            return False
        self._held = self._reader.rest
        self._skip_blank, self._blank = True, ""
        self._mode = "closing" if self._tools.close else "text"
        self._at_start = self._tools.bare
        return True

    def _read_close(self) -> bool:
        """Up to the closing mark, or to the next call where that one is missing."""
        assert self._tools is not None
        start, marker = _first(self._held, (self._tools.close, self._tools.open))
        if not marker:
            return False
        self._held = self._held[start + (len(marker) if marker == self._tools.close else 0) :]
        self._mode, self._skip_blank = "text", True
        return True

    def _take(self, events: list[CallStart | CallArguments]) -> None:
        for event in events:
            self._num_calls += isinstance(event, CallStart)
            if self._max_calls is None or self._num_calls <= self._max_calls:
                self._parts.append(event)

    def _content(self, text: str) -> None:
        if text.strip():
            self._at_start = False
        self._emit(Content(text))

    def _emit(self, part: Content | Reasoning) -> None:
        """Give out text, except white space at the edges of thoughts and calls."""
        text = part.text
        if self._skip_blank:
            text = text.lstrip()
            if not text:
                return
            self._skip_blank = False
        if not self._text_markers and not (self._tools and self._tools.bare):
            self._parts.append(part)
            return
        text = self._blank + text
        stripped = text.rstrip()
        self._blank = text[len(stripped) :]
        if stripped:
            self._parts.append(part._replace(text=stripped))


def _first(text: str, markers: tuple[str, ...]) -> tuple[int, str]:
    """Where the first of the markers stands, and which it is; (-1, "") if there is none."""
    found = [(start, marker) for marker in markers if (start := text.find(marker)) >= 0]
    return min(found, key=lambda item: item[0], default=(-1, ""))


def _split(text: str, position: int) -> tuple[str, str]:
    return text[:position], text[position:]


def possible_marker_length(text: str, markers: tuple[str, ...]) -> int:
    """Length of the longest end of the text that a marker begins with."""
    longest = 0
    for marker in markers:
        for length in range(min(len(marker) - 1, len(text)), longest, -1):
            if text.endswith(marker[:length]):
                longest = length
                break
    return longest
