"""A part of a linear's weight, read without the rest where its file allows that."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from qtool.convert.formats import WeightReader
from qtool.weight_parts import Part, take
from qtool.weights import Weight


@runtime_checkable
class PartialReader(Protocol):
    """A `WeightReader` that can leave out what is not asked for."""

    def part(self, module: str, part: Part) -> Weight:
        """As `WeightReader.weight`, of these rows and columns."""
        ...


@runtime_checkable
class StoredReader(Protocol):
    def stored(self, module: str) -> Weight:
        """As `WeightReader.weight`, with all quantized types as the blocks of the file."""
        ...


def read_part(reader: WeightReader, module: str, part: Part, *, stored: bool = False) -> Weight:
    """stored  as the file's own blocks, if it has such"""
    if stored and isinstance(reader, StoredReader):
        return take(reader.stored(module), part)
    if not part.is_whole and isinstance(reader, PartialReader):
        return reader.part(module, part)
    return take(reader.weight(module), part)
