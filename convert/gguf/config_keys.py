"""A model's settings: config.json to a GGUF file's keys and back, as its family has them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from qtool.arch import ARCHITECTURES, Architecture, find_family
from qtool.convert.gguf.container import GgufFile, KeyValue
from qtool.convert.gguf.families import FAMILIES
from qtool.convert.gguf.family import Family
from qtool.convert.gguf.reading import Reading, Scalar
from qtool.convert.gguf.types import ValueType
from qtool.errors import UnsupportedModel


def family_of(config: Mapping[str, Any]) -> tuple[Architecture, Family]:
    """Both rows of a config.json; raises UnsupportedModel with the list."""
    architecture = find_family(config)
    return architecture, FAMILIES[architecture.model_type]


def find_gguf_architecture(file: GgufFile) -> Architecture:
    """The family of a file, by its general.architecture."""
    name = file.metadata.get("general.architecture")
    for row in ARCHITECTURES.values():
        if row.gguf_name == name and FAMILIES[row.model_type].matches(file):
            return row
    known = sorted({row.gguf_name for row in ARCHITECTURES.values()})
    raise UnsupportedModel(
        f"GGUF architecture {name!r} is not supported", f"known: {', '.join(known)}"
    )


def settings_entries(config: Mapping[str, Any]) -> tuple[list[KeyValue], list[KeyValue]]:
    """The architecture's settings: those before general.file_type, and those after it."""
    architecture, family = family_of(config)
    filled = family.filled(config)
    if "n_inner" in family.aliases.values() and filled.get("n_inner") is None:
        filled["n_inner"] = 4 * filled["n_embd"]
    filled.setdefault("max_position_embeddings", 2048)
    family.check(filled)
    before, after = (
        [
            _key_value(f"{architecture.gguf_name}.{key}", value)
            for entry in entries
            for key, value in entry.write(filled)
        ]
        for entries in (family.settings, family.extra)
    )
    return before, after


def _key_value(key: str, value: Scalar) -> KeyValue:
    kinds = {
        bool: ValueType.BOOL,
        int: ValueType.UINT32,
        float: ValueType.FLOAT32,
        str: ValueType.STRING,
    }
    return KeyValue(key, value, kinds[type(value)])


def read_settings(file: GgufFile, architecture: Architecture) -> dict[str, Any]:
    """The part of config.json that a file's settings and tensors say."""
    family = FAMILIES[architecture.model_type]
    reading = Reading(file, architecture.gguf_name)
    config: dict[str, Any] = {key: allowed[0] for key, allowed in family.implied.items()}
    for entry in (*family.settings, *family.extra):
        entry.read(reading, config)
    return config
