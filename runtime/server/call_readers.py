"""Tool calls read from the text of an answer as it arrives.

The arguments of a JSON call are passed on while they are still being written, as the text that the
model wrote: a client puts the pieces together and parses them once. Syntaxes that are not JSON
(XML-like, Python) are read when the call is complete and turned into JSON.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import orjson

from qtool.runtime.server.tool_formats import ToolFormat

NAME_KEYS = ("name", "tool_name")
ARGUMENT_KEYS = ("arguments", "parameters", "args")
_NAME = re.compile(r"[\w.\-/]+")
Schemas = Mapping[str, Mapping[str, Any]]


class CallStart(NamedTuple):
    """A call begins; its arguments follow."""

    name: str


class CallArguments(NamedTuple):
    """The next part of the JSON of the newest call's arguments."""

    text: str


CallEvent = CallStart | CallArguments


class NotACall(Exception):
    """The text after the opening mark is no call; it was part of the answer."""


class CallReader(Protocol):
    rest: str | None
    """What came behind the end; None while the call goes on."""

    def push(self, text: str) -> list[CallEvent]: ...

    def finish(self) -> list[CallEvent]: ...


class JsonExtent:
    """Finds where one JSON value ends."""

    def __init__(self) -> None:
        self.done = False
        self._depth = 0
        self._in_string = False
        self._escaped = False
        self._begun = False

    def feed(self, text: str) -> int:
        """How much of the text belongs to the value."""
        for position, character in enumerate(text):
            if self._in_string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._in_string = False
                    self.done = self._depth == 0
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                if self._depth == 0:  # of what is around a bare number or word
                    self.done = True
                    return position
                self._depth -= 1
                self.done = self._depth == 0
            elif self._depth == 0 and self._begun and (character == "," or character.isspace()):
                self.done = True
                return position
            self._begun = self._begun or not character.isspace()
            if self.done:
                return position + 1
        return len(text)


class JsonObjectReader:
    """One `{"name": ..., "arguments": {...}}`."""

    def __init__(self) -> None:
        self.rest: str | None = None
        self._read: Callable[[str], str] = self._opening
        self._events: list[CallEvent] = []
        self._extent = JsonExtent()
        self._raw = ""
        self._key = ""
        self._name: str | None = None
        self._arguments = ""  # held until the name is known
        self._has_arguments = False

    def push(self, text: str) -> list[CallEvent]:
        while text and self.rest is None:
            text = self._read(text)
        if self.rest is not None:
            self.rest += text
        events, self._events = self._events, []
        return events

    def finish(self) -> list[CallEvent]:
        if self._name is None:
            raise NotACall
        return []

    def _opening(self, text: str) -> str:
        text = text.lstrip()
        if text and text[0] != "{":
            raise NotACall
        self._read = self._key_or_end if text else self._read
        return text[1:]

    def _key_or_end(self, text: str) -> str:
        text = text.lstrip(" \t\r\n,")
        if not text:
            return ""
        if text[0] == "}":
            if self._name is None:
                raise NotACall
            if not self._has_arguments:
                self._events.append(CallArguments("{}"))
            self.rest = ""
            return text[1:]
        if text[0] != '"':
            raise NotACall
        self._begin_value(self._key_text)
        return text

    def _begin_value(self, read: Callable[[str], str]) -> None:
        self._extent, self._raw, self._read = JsonExtent(), "", read

    def _key_text(self, text: str) -> str:
        used = self._extent.feed(text)
        self._raw += text[:used]
        if self._extent.done:
            self._key = str(_parsed(self._raw))
            self._read = self._colon
        return text[used:]

    def _colon(self, text: str) -> str:
        text = text.lstrip()
        if text and text[0] != ":":
            raise NotACall
        if text:
            self._begin_value(self._value)
        return text[1:]

    def _value(self, text: str) -> str:
        if not self._raw:
            text = text.lstrip()
        used = self._extent.feed(text)
        part, text = text[:used], text[used:]
        self._raw += part
        if self._key in ARGUMENT_KEYS and self._raw.startswith("{"):
            self._pass_on(part)
        if self._extent.done:
            self._value_is_whole()
            self._read = self._key_or_end
        return text

    def _pass_on(self, part: str) -> None:
        self._has_arguments = True
        if self._name is None:
            self._arguments += part
        elif part:
            self._events.append(CallArguments(part))

    def _value_is_whole(self) -> None:
        if self._key in NAME_KEYS:
            self._start(_parsed(self._raw))
        elif self._key in ARGUMENT_KEYS and not self._raw.startswith("{"):
            # Some models write the arguments as a string of JSON, or null for none.
            value = _parsed(self._raw)
            self._pass_on(value if isinstance(value, str) and value.strip() else "{}")
        elif self._key == "function" and isinstance(function := _parsed(self._raw), dict):
            self._start(function.get("name"))
            self._pass_on(orjson.dumps(function.get("arguments") or {}).decode())

    def _start(self, name: object) -> None:
        if not isinstance(name, str) or not name:
            raise NotACall
        if self._name is None:
            self._name = name
            self._events.append(CallStart(name))
            if self._arguments:
                self._events.append(CallArguments(self._arguments))


def _parsed(raw: str) -> Any:
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise NotACall from None


class JsonListReader:
    """Calls in brackets, `[{...}, {...}]`, or a single one without."""

    def __init__(self) -> None:
        self.rest: str | None = None
        self._in_list: bool | None = None
        self._call: JsonObjectReader | None = None
        self._num_calls = 0

    def push(self, text: str) -> list[CallEvent]:
        events: list[CallEvent] = []
        while text and self.rest is None:
            if self._call is None:
                text = self._between(text)
                continue
            events += self._call.push(text)
            text = self._call.rest or ""
            if self._call.rest is not None:
                self._call = None
                self._num_calls += 1
                if not self._in_list:
                    self.rest = text
        return events

    def _between(self, text: str) -> str:
        text = text.lstrip(" \t\r\n,")
        if not text:
            return ""
        if text[0] == "[" and self._in_list is None:
            self._in_list = True
            return text[1:]
        if text[0] == "]" and self._in_list and self._num_calls:
            self.rest = text[1:]
            return ""
        if text[0] != "{":
            raise NotACall
        self._in_list = bool(self._in_list)
        self._call = JsonObjectReader()
        return text

    def finish(self) -> list[CallEvent]:
        if self._call is not None:
            return self._call.finish()
        if not self._num_calls:
            raise NotACall
        return []


class NamedReader:
    """A name, something between, and the arguments as JSON: `f[ARGS]{...}`."""

    def __init__(self, lead: str) -> None:
        self.rest: str | None = None
        self._lead = lead
        self._header = ""
        self._extent: JsonExtent | None = None

    def push(self, text: str) -> list[CallEvent]:
        events: list[CallEvent] = []
        if self._extent is None:
            self._header += text
            header, brace, text = self._header.partition("{")
            if not brace:
                return []
            found = _NAME.search(header.strip().removeprefix(self._lead))
            if found is None:
                raise NotACall
            events.append(CallStart(found[0]))
            self._extent, text = JsonExtent(), brace + text
        used = self._extent.feed(text)
        if used:
            events.append(CallArguments(text[:used]))
        if self._extent.done:
            self.rest = text[used:]
        return events

    def finish(self) -> list[CallEvent]:
        if self._extent is None:
            raise NotACall
        return []


class WholeReader:
    """A call that is read when it is complete."""

    def __init__(self, close: str, read: Callable[[str], list[CallEvent]]) -> None:
        self.rest: str | None = None
        self._close = close
        self._read = read
        self._text = ""

    def push(self, text: str) -> list[CallEvent]:
        self._text += text
        if not self._close or self._close not in self._text:
            return []
        call, _, behind = self._text.partition(self._close)
        # The caller looks for the end itself.
        self.rest = self._close + behind
        return self._read(call)

    def finish(self) -> list[CallEvent]:
        return self._read(self._text)


def reader_for(tools: ToolFormat, schemas: Schemas) -> CallReader:
    match tools.body:
        case "object":
            return JsonObjectReader()
        case "list":
            return JsonListReader()
        case "named":
            return NamedReader(tools.before.partition("{name}")[0])
        case "xml":
            return WholeReader(tools.close, lambda text: _read_xml(text, schemas))
        case "key_values":
            return WholeReader(tools.close, lambda text: _read_key_values(text, schemas))
        case "pythonic":
            return WholeReader(tools.close, _read_pythonic)


_FUNCTION = re.compile(r"<function=([^>\s]+)>(.*?)(?:</function>|\Z)", re.DOTALL)
_PARAMETER = re.compile(r"<parameter=([^>\s]+)>\n?(.*?)\n?(?:</parameter>|\Z)", re.DOTALL)
_KEY_VALUE = re.compile(
    r"<arg_key>\s*(.*?)\s*</arg_key>\s*<arg_value>\n?(.*?)\n?</arg_value>", re.DOTALL
)


def _read_xml(text: str, schemas: Schemas) -> list[CallEvent]:
    found = _FUNCTION.findall(text)
    if not found:
        raise NotACall
    return [
        event
        for name, body in found
        for event in _whole_call(name, dict(_PARAMETER.findall(body)), schemas)
    ]


def _read_key_values(text: str, schemas: Schemas) -> list[CallEvent]:
    name = _NAME.match(text.strip())
    if name is None:
        raise NotACall
    return _whole_call(name[0], dict(_KEY_VALUE.findall(text)), schemas)


def _whole_call(name: str, texts: Mapping[str, str], schemas: Schemas) -> list[CallEvent]:
    """A call whose arguments came as text: strings where the schema says so, else JSON."""
    properties = schemas.get(name, {}).get("properties", {})
    arguments = {}
    for key, text in texts.items():
        schema = properties.get(key, {}) if isinstance(properties, Mapping) else {}
        kind = schema.get("type") if isinstance(schema, Mapping) else None
        arguments[key] = text if kind == "string" else _json_or_text(text)
    return [CallStart(name), CallArguments(orjson.dumps(arguments).decode())]


def _json_or_text(text: str) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _read_pythonic(text: str) -> list[CallEvent]:
    try:
        source = text.strip()
        tree = ast.parse(source if source.startswith("[") else f"[{source}]", mode="eval").body
        assert isinstance(tree, ast.List)
        events: list[CallEvent] = []
        for call in tree.elts:
            assert isinstance(call, ast.Call)
            arguments = {word.arg: ast.literal_eval(word.value) for word in call.keywords}
            events += [
                CallStart(ast.unparse(call.func)),
                CallArguments(orjson.dumps(arguments).decode()),
            ]
    except (SyntaxError, ValueError, TypeError, AssertionError, RecursionError, MemoryError):
        raise NotACall from None
    if not events:
        raise NotACall
    return events
