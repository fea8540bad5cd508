"""How each model family marks what it thinks before it answers, as a table.

The thoughts are split off the text and sent in fields of their own: `reasoning`, and under the
older name `reasoning_content`, since clients read one or the other. A template may open the
thoughts itself; the answer then begins inside of them, without an opening mark.
"""

from __future__ import annotations

from typing import NamedTuple

from qtool.errors import UnknownName


class ReasoningFormat(NamedTuple):
    """signs: what a chat template of this family holds, all of it; names: vLLM's parsers."""

    names: tuple[str, ...]
    open: str
    close: str
    signs: tuple[str, ...]


REASONING_FORMATS: tuple[ReasoningFormat, ...] = (
    ReasoningFormat(("mistral",), "[THINK]", "[/THINK]", ("[THINK]",)),
    ReasoningFormat(("seed_oss",), "<seed:think>", "</seed:think>", ("<seed:think>",)),
    ReasoningFormat(("gemma4",), "<|channel>thought\n", "<channel|>", ("<|channel>",)),
    ReasoningFormat(
        ("deepseek_r1", "qwen3", "glm45", "olmo3", "deepseek_v3"),
        "<think>",
        "</think>",
        ("</think>",),
    ),
)


def reasoning_format(name: str) -> ReasoningFormat:
    for entry in REASONING_FORMATS:
        if name in entry.names:
            return entry
    raise UnknownName(
        "reasoning parser", name, [known for entry in REASONING_FORMATS for known in entry.names]
    )


def reasoning_of(chat_template: str | None) -> ReasoningFormat | None:
    template = chat_template or ""
    return next(
        (entry for entry in REASONING_FORMATS if all(sign in template for sign in entry.signs)),
        None,
    )
