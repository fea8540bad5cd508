"""Typed reads of a file's metadata; every refusal names the file and the key."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy

from qtool.convert.gguf.container import GgufFile
from qtool.errors import FormatError

Scalar = int | float | str | bool


class Settings:
    """The values of keys, checked."""

    def __init__(self, metadata: Mapping[str, Any], where: str) -> None:
        self._metadata = metadata
        self._where = where

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`; `default` where it is missing, which None makes an error."""
        value = self._metadata.get(key)
        if value is None:
            if default is None:
                raise FormatError(f"{self._where} has no key {key}")
            return default
        right = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
        if not right:
            raise FormatError(f"{self._where}: {key} is {value!r}, not {kind.__name__}")
        return value

    def whole(self, key: str, default: int | None = None) -> int:
        value: int = self.get(key, int, default)
        if not 0 < value < 2**31:
            raise FormatError(f"{self._where}: {key} is {value}, not a positive 31-bit number")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """As `whole`, and zero."""
        value: int = self.get(key, int, default)
        return value if value == 0 else self.whole(key, default)

    def number(self, key: str, default: float | None = None) -> float:
        value: float = self.get(key, float, default)
        if not math.isfinite(value) or value <= 0:
            raise FormatError(f"{self._where}: {key} is {value}, not a positive number")
        # the shortest decimal of the stored float32: 1e-05, not 9.999999747378752e-06
        return float(str(numpy.float32(value)))


@dataclass(frozen=True, slots=True)
class Reading:
    """A file whose settings are being read; keys are without the architecture's name."""

    file: GgufFile
    prefix: str

    @property
    def where(self) -> str:
        return str(self.file.path)

    @property
    def _settings(self) -> Settings:
        return Settings(self.file.metadata, self.where)

    def has(self, key: str) -> bool:
        return f"{self.prefix}.{key}" in self.file.metadata

    def whole(self, key: str, default: int | None = None) -> int:
        return self._settings.whole(f"{self.prefix}.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        return self._settings.count(f"{self.prefix}.{key}", default)

    def number(self, key: str, default: float | None = None) -> float:
        return self._settings.number(f"{self.prefix}.{key}", default)

    def flag(self, key: str, default: bool | None = None) -> bool:
        value: bool = self._settings.get(f"{self.prefix}.{key}", bool, default)
        return value

    def text(self, key: str, default: str | None = None) -> str:
        value: str = self._settings.get(f"{self.prefix}.{key}", str, default)
        return value
