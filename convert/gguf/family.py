"""What GGUF knows of a family of qtool/arch.py: a row of families.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from qtool.arch import Role
from qtool.convert.gguf.container import GgufFile
from qtool.convert.gguf.entries import Entry
from qtool.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class Family:
    """One family's metadata.

    settings      written before general.file_type
    extra         written after it
    implied       entries of config.json that the architecture's name stands for, with the values
                  that mean the same; reading writes the first
    defaults      transformers' own, of entries that published configs leave out
    aliases       entries that this family spells otherwise: "hidden_size": "n_embd"
    shapes        roles that have another shape than in `role_shapes.SHAPES`
    loses_window  a sliding window has no key, so that the file attends to more than the model
    matches       which of several families of one architecture a file is; the first that fits
    """

    hf_class: str
    settings: tuple[Entry, ...]
    extra: tuple[Entry, ...] = ()
    implied: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
    loses_window: bool = False
    matches: Callable[[GgufFile], bool] = lambda file: True

    def filled(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """config.json with the defaults of what it leaves out."""
        given = {key: value for key, value in config.items() if value is not None}
        return {**self.defaults, **given}

    def check(self, config: Mapping[str, Any]) -> None:
        """Raise UnsupportedModel for what GGUF's architecture would run otherwise."""
        for key, allowed in self.implied.items():
            value = config.get(key, allowed[0])
            if value not in allowed:
                raise UnsupportedModel(
                    f"config.json: {key} {value!r} is not {allowed[0]!r}, which is what GGUF means "
                    f"for {config.get('model_type')}"
                )
