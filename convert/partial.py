"""What some readers of weights can beside `WeightReader`: parts of a linear, blocks as the file has
them, pages given back.
"""

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
    """A `WeightReader` of files whose quantized types are blocks."""

    def stored(self, module: str) -> Weight:
        """As `WeightReader.weight`, with all quantized types as the blocks of the file."""
        ...

    def stored_part(self, module: str, part: Part) -> Weight: ...


@runtime_checkable
class MappedReader(Protocol):
    def release(self) -> None:
        """Give back the memory of what has been read; what is still in use is read again."""
        ...


def read_part(reader: WeightReader, module: str, part: Part, *, stored: bool = False) -> Weight:
    """stored  as the file's own blocks, if it has such"""
    if stored and isinstance(reader, StoredReader):
        return reader.stored(module) if part.is_whole else reader.stored_part(module, part)
    if part.is_whole:
        return reader.weight(module)
    if isinstance(reader, PartialReader):
        return reader.part(module, part)
    return take(reader.weight(module), part)
