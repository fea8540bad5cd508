"""What config.json says of the layouts that are this project's own: a version, and every layer.

quant_method, version    which layout
layers                   module -> what its tensors hold, in words of the layout
modules_to_not_convert   modules in 16 bit
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qtool.errors import FormatError, UnsupportedModel


@dataclass(frozen=True, slots=True)
class OwnConfig:
    """name  in messages; hint: what to do with a file of another version"""

    quant_method: str
    version: int
    name: str
    hint: str

    def entry(self, layers: Mapping[str, Any], dense: Sequence[str]) -> dict[str, Any]:
        """quantization_config: every packed layer by name, nothing to be guessed."""
        return {
            "quant_method": self.quant_method,
            "version": self.version,
            "layers": dict(layers),
            "modules_to_not_convert": list(dense),
        }

    def layers(
        self, config: Mapping[str, Any], modules: Sequence[str], where: str
    ) -> Mapping[str, Any]:
        """What a file's quantization_config says of its layers; `modules` have packed tensors."""
        if config.get("version") != self.version:
            raise UnsupportedModel(
                f"{where}: {self.name} layout version {config.get('version')!r}; this qtool reads "
                f"{self.version}",
                self.hint,
            )
        layers = config.get("layers")
        if not isinstance(layers, Mapping):
            raise FormatError(f"{where}: quantization_config has no table of layers")
        missing = sorted(set(layers) - set(modules))
        if missing:
            raise FormatError(f"{where}: {missing[0]} is packed by the config, and has no tensors")
        return layers
