"""The language model inside a multimodal checkpoint, seen as a checkpoint of its own.

Such a folder has the text model's config under text_config (or, in the first of them, beside the
vision tower's) and its tensors under a prefix of their own. Without images its positions are those
of a text, so that rotary embeddings of several axes ("mrope") turn as plain ones do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from qtool.convert.formats import Held, WeightReader
from qtool.convert.partial import read_part
from qtool.source import Source
from qtool.weight_parts import Part
from qtool.weights import Weight

# What a text model is called inside, and the family that it is.
FAMILY_OF_PART = {
    "qwen2_vl": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen2_5_vl": "qwen2",
    "qwen2_5_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
# A prefix in the file and what the text model by itself has in its place.
_PREFIXES = (
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("model.language_model.", "model."),
)


@dataclass(frozen=True, slots=True, eq=False)
class TextPart:
    """A WeightReader of the text model alone: names by its own names of the file's."""

    whole: WeightReader
    config: dict[str, Any]
    names: Mapping[str, str]

    @property
    def source(self) -> Source:
        return self.whole.source

    @property
    def format(self) -> str:
        return self.whole.format

    def modules(self) -> list[str]:
        packed = set(self.whole.modules())
        return [name for name, held in self.names.items() if held in packed]

    def tensor_names(self) -> list[str]:
        packed = set(self.whole.modules())
        return [name for name, held in self.names.items() if held not in packed]

    def describe(self, name: str) -> Held:
        return self.whole.describe(self._held(name))

    def weight(self, module: str) -> Weight:
        return self.whole.weight(self._held(module))

    def part(self, module: str, part: Part) -> Weight:
        return read_part(self.whole, self._held(module), part)

    def tensor(self, name: str) -> Tensor:
        return self.whole.tensor(self._held(name))

    def has(self, name: str) -> bool:
        return self.whole.has(self._held(name))

    def _held(self, name: str) -> str:
        """Also of names that stand for others: a module of its ".weight", and the reverse."""
        if name in self.names:
            return self.names[name]
        module = name.removesuffix(".weight")
        if module in self.names:
            return f"{self.names[module]}.weight"
        return self.names.get(f"{name}.weight", name).removesuffix(".weight")


def text_part(reader: WeightReader) -> TextPart | None:
    """None for a model that is text alone."""
    outer = reader.config
    inner = outer.get("text_config")
    if not isinstance(inner, Mapping):
        if outer.get("model_type") not in FAMILY_OF_PART:
            return None
        inner = outer
    names = _text_names([*reader.tensor_names(), *reader.modules()])
    config = dict(inner)
    family = str(inner.get("model_type"))
    config["model_type"] = FAMILY_OF_PART.get(family, family)
    for key in ("eos_token_id", "bos_token_id", "dtype", "torch_dtype"):
        if config.get(key) is None and outer.get(key) is not None:
            config[key] = outer[key]
    config["tie_word_embeddings"] = "lm_head.weight" not in names and "lm_head" not in names
    for key in ("rope_parameters", "rope_scaling"):
        config[key] = _one_axis(config.get(key))
    return TextPart(reader, config, names)


def _text_names(held: list[str]) -> dict[str, str]:
    """The text model's names of the file's; files without a prefix have them as they are."""
    found = {}
    for name in held:
        for prefix, own in _PREFIXES:
            if f"{name}.".startswith(prefix):
                found[f"{own}{f'{name}.'.removeprefix(prefix)}".removesuffix(".")] = name
    plain = {name: name for name in held if name.startswith("lm_head")}
    if not any(name.startswith("model.") for name in found):
        plain |= {name: name for name in held if name.startswith("model.")}
    return plain | found


def _one_axis(parameters: Any) -> Any:
    if not isinstance(parameters, Mapping):
        return parameters
    kept = {key: value for key, value in parameters.items() if key != "mrope_section"}
    for key in ("rope_type", "type"):
        if kept.get(key) == "mrope":
            kept[key] = "default"
    return kept
