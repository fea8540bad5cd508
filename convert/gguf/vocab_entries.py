"""What every kind of tokenizer has in GGUF: special tokens, what is added to a text, templates.

Key order, and which file a special token's id is taken from, are those of llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from qtool.convert.gguf.container import KeyValue
from qtool.convert.gguf.types import ValueType
from qtool.convert.gguf.vocab import PREFIX, SPECIAL_KEYS
from qtool.json_files import read_json

# The converter's order; eot and eom are added here, for models with several ends.
_SPECIAL_ORDER = ("bos", "eos", "unk", "sep", "pad", "mask")


def special_entries(
    folder: Path,
    source: Mapping[str, Any],
    settings: Mapping[str, Any],
    config: Mapping[str, Any],
    tokens: list[str],
) -> Iterator[KeyValue]:
    ids = {text: number for number, text in enumerate(tokens)}
    found: dict[str, int] = {}
    for name in _SPECIAL_ORDER:
        entry = settings.get(f"{name}_token")
        text = entry.get("content") if isinstance(entry, dict) else entry
        number = ids.get(text) if isinstance(text, str) else config.get(f"{name}_token_id")
        if isinstance(number, int) and 0 <= number < len(tokens):
            found[name] = number
    ends = _end_ids(folder, config)
    if "eos" not in found and ends:
        found["eos"] = ends[0]
    for number in ends:
        if number not in found.values() and number < len(tokens):
            found.setdefault("eom" if tokens[number] == "<|eom_id|>" else "eot", number)
    for name, number in found.items():
        yield KeyValue(PREFIX + SPECIAL_KEYS[name], number, ValueType.UINT32)
    for name, ends_with in (("bos", False), ("eos", True)):
        adds = _adds(source, settings, name, ends_with=ends_with)
        if adds is not None:
            yield KeyValue(f"{PREFIX}add_{name}_token", adds, ValueType.BOOL)


def _end_ids(folder: Path, config: Mapping[str, Any]) -> list[int]:
    """Every end-of-text id of generation_config.json and config.json."""
    generation = read_optional(folder / "generation_config.json")
    ids: list[int] = []
    for place in (generation, config):
        value = place.get("eos_token_id")
        ids += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys(ids))


def _adds(
    source: Mapping[str, Any], settings: Mapping[str, Any], name: str, *, ends_with: bool
) -> bool | None:
    """Whether encoding adds bos or eos: what the post-processor does, else what the config says.

    Always said for bos: llama.cpp's default depends on the kind of tokenizer.
    """
    entry = settings.get(f"{name}_token")
    text = entry.get("content") if isinstance(entry, dict) else entry
    processor = source.get("post_processor") or {}
    for part in processor.get("processors", [processor]):
        if part.get("type") == "TemplateProcessing" and len(part.get("single", [])) > 1:
            edge = part["single"][-1 if ends_with else 0].get("SpecialToken", {}).get("id")
            if edge is not None and edge == text:
                return True
    said = settings.get(f"add_{name}_token")
    if source.get("post_processor") is None and isinstance(said, bool):
        return said
    return None if ends_with and not isinstance(said, bool) else False


def template_entries(folder: Path, settings: Mapping[str, Any]) -> Iterator[KeyValue]:
    """Chat templates: one string, or a named set of which "default" is the one without a name."""
    template = settings.get("chat_template")
    file = folder / "chat_template.jinja"
    old_file = folder / "chat_template.json"
    named: dict[str, str] = {}
    if template is None and file.is_file():
        named["default"] = file.read_text(encoding="utf-8")
        for other in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            named[other.stem] = other.read_text(encoding="utf-8")
    elif template is None and old_file.is_file():
        template = read_json(old_file).get("chat_template")
    if isinstance(template, str):
        named["default"] = template
    elif isinstance(template, list):
        named = {
            str(item["name"]): str(item["template"])
            for item in template
            if isinstance(item, dict) and "name" in item and "template" in item
        }
    others = {
        "".join(c if c.isascii() and c.isalnum() else "_" for c in name): text
        for name, text in named.items()
        if name != "default"
    }
    for name, text in others.items():
        yield KeyValue(f"tokenizer.chat_template.{name}", text, ValueType.STRING)
    if others:
        yield KeyValue(
            "tokenizer.chat_templates", sorted(others), ValueType.ARRAY, ValueType.STRING
        )
    if "default" in named:
        yield KeyValue("tokenizer.chat_template", named["default"], ValueType.STRING)


def read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def text_entry(key: str, value: str) -> KeyValue:
    return KeyValue(PREFIX + key, value, ValueType.STRING)


def list_entry(key: str, values: list[Any], element: ValueType) -> KeyValue:
    return KeyValue(PREFIX + key, values, ValueType.ARRAY, element)
