"""Answers split into thoughts, text and calls, the same however the text is cut into steps."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qtool.runtime.server.call_readers import JsonExtent
from qtool.runtime.server.harmony import HarmonyReader
from qtool.runtime.server.message_parser import MessageParser, MessageReader, ParsedMessage
from qtool.runtime.server.reasoning import reasoning_format, reasoning_of
from qtool.runtime.server.tool_formats import FORCED, TOOL_FORMATS, format_of, tool_format

THINK = reasoning_format("qwen3")
SCHEMAS = {"f": {"properties": {"text": {"type": "string"}, "count": {"type": "integer"}}}}
ARGUMENTS = {"text": 'a "}" \\ é', "count": 2}
JSON = json.dumps(ARGUMENTS, ensure_ascii=False)


def read(reader: MessageReader, pieces: list[str]) -> ParsedMessage:
    message = ParsedMessage()
    for piece in pieces:
        for part in reader.push(piece):
            message.add(part)
    for part in reader.finish():
        message.add(part)
    return message


def calls(message: ParsedMessage) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in message.calls]


# Each family's own way to write one and the same call.
WRITTEN = {
    "hermes": f'<tool_call>\n{{"name": "f", "arguments": {JSON}}}\n</tool_call>',
    "qwen3_coder": '<tool_call>\n<function=f>\n<parameter=text>\na "}" \\ é\n</parameter>\n'
    "<parameter=count>\n2\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f\n<arg_key>text</arg_key>\n<arg_value>"
    'a "}" \\ é</arg_value>\n<arg_key>count</arg_key>\n<arg_value>2</arg_value>\n</tool_call>',
    "mistral_named": f"[TOOL_CALLS]f[ARGS]{JSON}",
    "mistral": f'[TOOL_CALLS][{{"name": "f", "arguments": {JSON}}}]',
    "deepseek_v3": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n"  # noqa: RUF001
    f"```json\n{JSON}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",  # noqa: RUF001
    "deepseek_v31": "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>"  # noqa: RUF001
    f"{JSON}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",  # noqa: RUF001
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0"
    f"<|tool_call_argument_begin|>{JSON}<|tool_call_end|><|tool_calls_section_end|>",
    "granite": f'<|tool_call|>[{{"name": "f", "arguments": {JSON}}}]',
    "internlm": f'<|action_start|><|plugin|>\n{{"name": "f", "parameters": {JSON}}}<|action_end|>',
    "jamba": f'<tool_calls>[{{"name": "f", "arguments": {JSON}}}]</tool_calls>',
    "llama3_json": f'{{"name": "f", "parameters": {JSON}}}',
    "olmo3": f"<function_calls>f(text={ARGUMENTS['text']!r}, count=2)</function_calls>",
    "pythonic": f"[f(text={ARGUMENTS['text']!r}, count=2)]",
}


def test_every_family_has_its_example() -> None:
    assert set(WRITTEN) == {entry.name for entry in TOOL_FORMATS}


@pytest.mark.parametrize("name", WRITTEN)
@pytest.mark.parametrize("step", [1, 3, 1000])
def test_a_call_is_read_in_every_familys_syntax(name: str, step: int) -> None:
    text = WRITTEN[name]
    pieces = [text[start : start + step] for start in range(0, len(text), step)]
    message = read(MessageParser(tool_format(name), None, schemas=SCHEMAS), pieces)
    assert calls(message) == [("f", ARGUMENTS)]
    assert message.content == ""


@pytest.mark.parametrize("name", [name for name in WRITTEN if not tool_format(name).bare])
def test_text_before_a_call_is_the_answer(name: str) -> None:
    written = f"I look it up.\n{WRITTEN[name]}"
    message = read(MessageParser(tool_format(name), None, schemas=SCHEMAS), [*written])
    assert message.content == "I look it up."
    assert len(message.calls) == 1


TWO = "<think>\nTwo.\n</think>\n\nBoth:\n" + "\n".join(
    f'<tool_call>\n{{"name": "{name}", "arguments": {{"x": {place}}}}}\n</tool_call>'
    for place, name in enumerate("fg")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, len(TWO) - 1), unique=True))
def test_how_the_text_is_cut_does_not_matter(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(TWO)]
    pieces = [TWO[start:end] for start, end in pairwise(edges)]
    message = read(MessageParser(tool_format("hermes"), THINK), pieces)
    assert message.reasoning == "Two."
    assert message.content == "Both:"
    assert calls(message) == [("f", {"x": 0}), ("g", {"x": 1})]


def test_arguments_are_given_out_while_they_are_written() -> None:
    reader = MessageParser(tool_format("hermes"), None)
    seen = [
        str(part) for part in reader.push('<tool_call>{"name": "f", "arguments": {"text": "Hel')
    ]
    assert seen == ["CallStart(name='f')", 'CallArguments(text=\'{"text": "Hel\')']


def test_calls_above_the_most_are_dropped() -> None:
    message = read(MessageParser(tool_format("hermes"), THINK, max_calls=1), [TWO])
    assert [call.name for call in message.calls] == ["f"]


@pytest.mark.parametrize(
    "text", ["<tool_call>no JSON</tool_call>", "<tool_call>{5: 1}", "<tool_call>", "a < b"]
)
def test_what_looks_like_a_call_and_is_none_stays_text(text: str) -> None:
    message = read(MessageParser(tool_format("hermes"), None), [*text])
    assert message.content == text
    assert not message.calls


def test_json_that_is_no_call_stays_text() -> None:
    text = '{"answer": 5}'
    message = read(MessageParser(tool_format("llama3_json"), None), [*text])
    assert message.content == text


@pytest.mark.parametrize(
    ("call", "arguments"),
    [
        ('{"arguments": {"x": 1}, "name": "f"}', {"x": 1}),
        ('{"name": "f"}', {}),
        ('{"name": "f", "arguments": null}', {}),
        ('{"name": "f", "arguments": "{\\"x\\": 1}"}', {"x": 1}),
        ('{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}', {"x": 1}),
    ],
)
def test_calls_in_other_shapes_are_understood(call: str, arguments: Any) -> None:
    reader = MessageParser(tool_format("hermes"), None)
    assert calls(read(reader, [*f"<tool_call>{call}</tool_call>"])) == [("f", arguments)]


def test_thoughts_that_the_template_opened_need_no_mark() -> None:
    message = read(MessageParser(None, THINK, starts_reasoning=True), [*"Hm.\n</think>\n\nYes."])
    assert (message.reasoning, message.content) == ("Hm.", "Yes.")


def test_thoughts_cut_short_are_thoughts() -> None:
    assert read(MessageParser(None, THINK), ["<think>Hm"]).reasoning == "Hm"


def test_white_space_inside_the_answer_is_kept() -> None:
    text = "One\n\n  two "
    assert read(MessageParser(tool_format("hermes"), THINK), [*text]).content == text


def test_calls_in_a_list_are_read_without_marks() -> None:
    text = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {"x": []}}]'
    assert calls(read(MessageParser(FORCED, None), [*text])) == [("f", {}), ("g", {"x": []})]


HARMONY = (
    "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>commentary "
    'to=functions.f <|constrain|>json<|message|>{"x": 1}<|call|>'
)


@pytest.mark.parametrize("step", [1, 7, 1000])
def test_channels_of_harmony_are_read(step: int) -> None:
    pieces = [HARMONY[start : start + step] for start in range(0, len(HARMONY), step)]
    message = read(HarmonyReader(), pieces)
    assert message.reasoning == "Hm."
    assert calls(message) == [("f", {"x": 1})]
    final = read(HarmonyReader(), [*"<|channel|>final<|message|>Yes.<|return|>"])
    assert final.content == "Yes."


@pytest.mark.parametrize("value", [{"a": [1, '"}', {}]}, [1, 2], 'a\\"b', 5, True, None])
def test_the_end_of_a_value_is_found(value: Any) -> None:
    text = json.dumps(value)
    extent = JsonExtent()
    behind = ", 1}"
    assert extent.feed(text + behind) == len(text)
    assert extent.done


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{% if tools %}<tool_call>{% endif %}", "hermes"),
        ("{% if tools %}<tool_call>\n<function=f>\n<parameter=x>", "qwen3_coder"),
        ("{{ tools }}[TOOL_CALLS]", "mistral"),
        ("{{ tools }}[TOOL_CALLS]name[ARGS]", "mistral_named"),
        ("{{ tools }}of another syntax", "hermes"),
    ],
)
def test_a_template_shows_its_familys_syntax(template: str, name: str) -> None:
    found = format_of(template)
    assert found is not None
    assert found.name == name


def test_a_template_without_tools_has_no_syntax() -> None:
    assert format_of("{{ messages }}") is None
    assert format_of(None) is None
    assert reasoning_of("{{ messages }}") is None
    assert reasoning_of("<think></think>") == THINK
