"""How each model family writes a tool call, as a table.

Models are trained on one syntax, and their chat template shows it: `signs` are what a template
that uses it holds. A call is read from the text as it arrives (`message_parser.py`) and, where its
arguments are JSON, written under a grammar (`tool_grammar.py`), so that they always parse.

    hermes       <tool_call>\\n{"name": "f", "arguments": {...}}\\n</tool_call>
    qwen3_coder  <tool_call>\\n<function=f>\\n<parameter=x>\\n1\\n</parameter>\\n</function>...
    glm45        <tool_call>f\\n<arg_key>x</arg_key>\\n<arg_value>1</arg_value>\\n</tool_call>
    mistral      [TOOL_CALLS][{"name": "f", "arguments": {...}}]; newer: [TOOL_CALLS]f[ARGS]{...}
    llama3_json  {"name": "f", "parameters": {...}}, with or without <|python_tag|> before it
    deepseek_v3  <｜tool▁call▁begin｜>function<｜tool▁sep｜>f, a code block of JSON,
                 <｜tool▁call▁end｜>
    deepseek_v31 <｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜>
    kimi_k2      <|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{...}<|tool_call_end|>
    granite      <|tool_call|>[{"name": "f", "arguments": {...}}]
    pythonic     [f(x=1), g()]

Sources: the models' own chat templates, and the parsers of vLLM's `--tool-call-parser`, whose
names these are.
"""

# ruff: noqa: RUF001, RUF002 - DeepSeek's marks have wide bars in them

from __future__ import annotations

from typing import Literal, NamedTuple

from qtool.errors import UnknownName

CallBody = Literal["object", "list", "named", "xml", "key_values", "pythonic"]


class ToolFormat(NamedTuple):
    """
    name       vLLM's
    open       what begins a call, or a list of calls; "": the answer begins with one
    close      what ends it; "": where the JSON ends
    body       object, list: JSON with a name and arguments; named: the name, then its arguments
    before     what a call is written with up to its arguments; {name} stands for the name
    after      and behind them, `close` left out
    signs      what a chat template of this family holds, all of it
    bare       a call may come without `open`, if the answer begins with it
    dropped    brackets around the calls of one answer, of no meaning
    """

    name: str
    open: str
    close: str
    body: CallBody
    before: str = ""
    after: str = ""
    signs: tuple[str, ...] = ()
    bare: bool = False
    dropped: tuple[str, ...] = ()
    short_ids: bool = False

    @property
    def has_json_arguments(self) -> bool:
        return self.body in ("object", "list", "named")

    @property
    def markers(self) -> tuple[str, ...]:
        return tuple(text for text in (self.open, *self.dropped) if text)


_OBJECT = '{"name": "{name}", "arguments": '

# In the order in which templates are looked at: the first whose signs are all there.
TOOL_FORMATS: tuple[ToolFormat, ...] = (
    ToolFormat(
        "qwen3_coder", "<tool_call>", "</tool_call>", "xml", signs=("<function=", "<parameter=")
    ),
    ToolFormat("glm45", "<tool_call>", "</tool_call>", "key_values", signs=("<arg_key>",)),
    ToolFormat(
        "hermes",
        "<tool_call>",
        "</tool_call>",
        "object",
        before=f"\n{_OBJECT}",
        after="}\n",
        signs=("<tool_call>",),
    ),
    ToolFormat(
        "mistral_named",
        "[TOOL_CALLS]",
        "",
        "named",
        before="{name}[ARGS]",
        signs=("[TOOL_CALLS]", "[ARGS]"),
        short_ids=True,
    ),
    ToolFormat(
        "mistral",
        "[TOOL_CALLS]",
        "",
        "list",
        before=_OBJECT,
        after="}",
        signs=("[TOOL_CALLS]",),
        short_ids=True,
    ),
    ToolFormat(
        "deepseek_v3",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "named",
        before="function<｜tool▁sep｜>{name}\n```json\n",
        after="\n```",
        signs=("<｜tool▁call▁begin｜>", "```json"),
        dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolFormat(
        "deepseek_v31",
        "<｜tool▁call▁begin｜>",
        "<｜tool▁call▁end｜>",
        "named",
        before="{name}<｜tool▁sep｜>",
        signs=("<｜tool▁call▁begin｜>",),
        dropped=("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"),
    ),
    ToolFormat(
        "kimi_k2",
        "<|tool_call_begin|>",
        "<|tool_call_end|>",
        "named",
        before="functions.{name}:0<|tool_call_argument_begin|>",
        signs=("<|tool_call_begin|>",),
        dropped=("<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"),
    ),
    ToolFormat(
        "granite",
        "<|tool_call|>",
        "",
        "list",
        before=_OBJECT,
        after="}",
        signs=("<|tool_call|>",),
        dropped=("<|/tool_call|>",),
    ),
    ToolFormat(
        "internlm",
        "<|action_start|><|plugin|>",
        "<|action_end|>",
        "object",
        before='{"name": "{name}", "parameters": ',
        after="}",
        signs=("<|action_start|>", "<|plugin|>"),
    ),
    ToolFormat(
        "jamba",
        "<tool_calls>",
        "</tool_calls>",
        "list",
        before=_OBJECT,
        after="}",
        signs=("<tool_calls>",),
    ),
    ToolFormat(
        "llama3_json",
        "<|python_tag|>",
        "",
        "object",
        before='{"name": "{name}", "parameters": ',
        after="}",
        signs=('{"name": function name, "parameters":',),
        bare=True,
    ),
    ToolFormat(
        "olmo3",
        "<function_calls>",
        "</function_calls>",
        "pythonic",
        signs=("<function_calls>",),
    ),
    ToolFormat("pythonic", "", "", "pythonic", signs=("[func_name1(",), bare=True),
)

# For models whose template knows no tools: they are told of this one in the system prompt.
GENERIC = next(entry for entry in TOOL_FORMATS if entry.name == "hermes")
# For a call that is asked for of a family whose own syntax no grammar here writes.
FORCED = ToolFormat("json", "", "", "list", before=_OBJECT, after="}", bare=True)


def tool_format(name: str) -> ToolFormat:
    for entry in TOOL_FORMATS:
        if entry.name == name:
            return entry
    raise UnknownName("tool call parser", name, [entry.name for entry in TOOL_FORMATS])


def format_of(chat_template: str | None) -> ToolFormat | None:
    """The family's syntax; None where the template knows no tools."""
    if chat_template is None or "tools" not in chat_template:
        return None
    return next(
        (entry for entry in TOOL_FORMATS if all(sign in chat_template for sign in entry.signs)),
        GENERIC,
    )


INSTRUCTIONS = """\
You can call functions. To call one, answer with a line <tool_call>, then JSON with its name and \
arguments, then a line </tool_call>:
<tool_call>
{"name": "function_name", "arguments": {"parameter": "value"}}
</tool_call>
The functions, as JSON schemas:
"""
