"""Grammars under which tool calls are written, so that their arguments always parse.

In llguidance's dialect of Lark (github.com/guidance-ai/llguidance, docs/syntax.md). Each tool's
schema is a `%json` of its own, so that `$ref` in it keeps its root. Marks that are special tokens
of the vocabulary are written as `<[id]>`, all others as text.

    auto      (text, then a call)*, then text: only what stands between a call's marks is bound
    required  calls and nothing else, behind the thoughts where the template has opened them
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from qtool.runtime.server.chat_protocol import ToolBody
from qtool.runtime.server.reasoning import ReasoningFormat
from qtool.runtime.server.tool_formats import ToolFormat

MAX_CALLS = 16  # a model that repeats itself would fill the context with calls
ANY_TEXT = r"/(.|\n)*/"


def parameters_schema(tool: ToolBody) -> dict[str, Any]:
    """The schema of a call's arguments: an object, without fields that the tool does not name."""
    schema = dict(tool.function.parameters or {})
    schema.setdefault("type", "object")
    if schema.get("properties"):
        schema.setdefault("additionalProperties", False)
    return schema


# llguidance's own options. JSON as json.dumps writes it, which is what models have been shown; free
# white space lets a weak model write line breaks until its tokens run out.
COMPACT = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class GrammarWriter:
    def __init__(self, special_ids: Mapping[str, int]) -> None:
        self._special_ids = special_ids
        longest_first = sorted(special_ids, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def is_special(self, text: str) -> bool:
        return text in self._special_ids

    def literal(self, text: str) -> str:
        """The text as a sequence of strings and special tokens."""
        pieces: list[str] = []
        position = 0
        for found in self._special.finditer(text):
            pieces.append(self._quoted(text[position : found.start()]))
            pieces.append(f"<[{self._special_ids[found[0]]}]>")
            position = found.end()
        pieces.append(self._quoted(text[position:]))
        return " ".join(piece for piece in pieces if piece)

    @staticmethod
    def _quoted(text: str) -> str:
        return orjson.dumps(text).decode() if text else ""

    def up_to(self, rule: str, mark: str) -> str:
        """A rule for any text that ends with the mark."""
        if self.is_special(mark):
            return f"{rule}: ANY_TEXT {self.literal(mark)}\n"
        return f"{rule}[lazy]: ANY_TEXT {self._quoted(mark)}\n"

    def calls(self, form: ToolFormat, tools: Sequence[ToolBody]) -> str:
        """The rule `call`: one call of any of the tools, without the list or marks around it."""
        rules = [f"call: {' | '.join(f'call_{number}' for number in range(len(tools)))}"]
        for number, tool in enumerate(tools):
            before = self.literal(form.before.replace("{name}", tool.function.name))
            schema = orjson.dumps({**parameters_schema(tool), "x-guidance": COMPACT}).decode()
            after = self.literal(form.after)
            rules.append(f"call_{number}: {before} arguments_{number} {after}")
            rules.append(f"arguments_{number}: %json {schema}")
        return "\n".join(rules) + "\n"

    def section(self, form: ToolFormat, max_calls: int) -> str:
        """The rule `section`: what follows the opening mark, to the end of the closing one."""
        close = self.literal(form.close)
        if form.body != "list":
            return f"section: call {close}\n"
        more = f' (", " call){{0,{max_calls - 1}}}' if max_calls > 1 else ""
        return f'section: "[" call{more} "]" {close}\n'


def forced_grammar(
    form: ToolFormat,
    tools: Sequence[ToolBody],
    special_ids: Mapping[str, int],
    *,
    max_calls: int | None,
    open_reasoning: ReasoningFormat | None,
) -> str:
    """At least one call, and nothing but calls.

    open_reasoning  set where the prompt has opened the thoughts, which then come first
    """
    writer = GrammarWriter(special_ids)
    limit = min(max_calls or MAX_CALLS, MAX_CALLS)
    opening = "" if form.bare else writer.literal(form.open)
    one_section = form.body == "list" or form.bare or limit == 1
    repeat = "" if one_section else f'("\\n"? {opening} section){{0,{limit - 1}}}'
    lark = f"start: {'thoughts ' if open_reasoning else ''}{opening} section {repeat}\n"
    if open_reasoning:
        lark += f"thoughts: thoughts_end /\\s{{0,2}}/\nANY_TEXT: {ANY_TEXT}\n"
        lark += writer.up_to("thoughts_end", open_reasoning.close)
    return lark + writer.section(form, limit) + writer.calls(form, tools)


def auto_grammar(
    form: ToolFormat,
    tools: Sequence[ToolBody],
    special_ids: Mapping[str, int],
    *,
    max_calls: int | None,
    reasoning: ReasoningFormat | None,
) -> str | None:
    """Any text with calls in it; None where a call cannot be told from text in time, or where
    thoughts are marked by special tokens, which text cannot hold.
    """
    writer = GrammarWriter(special_ids)
    marks = (reasoning.open, reasoning.close) if reasoning else ()
    unmarked = form.bare or not form.open or not form.has_json_arguments
    if unmarked or any(map(writer.is_special, (*marks, *form.dropped))):
        return None
    limit = min(max_calls or MAX_CALLS, MAX_CALLS)
    return (
        f"start: (opened section){{0,{limit}}} ANY_TEXT\nANY_TEXT: {ANY_TEXT}\n"
        + writer.up_to("opened", form.open)
        + writer.section(form, limit)
        + writer.calls(form, tools)
    )
