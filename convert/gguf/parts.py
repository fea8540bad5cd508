"""Models in several files: opened from the first, the others found beside it.

llama.cpp's gguf-split names them NAME-00001-of-00003.gguf, counted from 1. Each is a GGUF file with
its own tensors; all carry split.no (from 0), split.count and split.tensors.count (of all), and the
first alone carries the model's metadata.
"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from qtool.convert.gguf.container import GgufFile, TensorEntry
from qtool.convert.gguf.split import SPLIT_KEYS
from qtool.errors import FormatError

_PART = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def part_paths(path: Path, count: int) -> tuple[Path, ...]:
    """The files of a model that is to be `path`: itself, or its parts beside where it would be."""
    if count == 1:
        return (path,)
    names = [_part_name(path.stem, number, count) for number in range(1, count + 1)]
    return tuple(path.with_name(name) for name in names)


def _part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number:05}-of-{count:05}.gguf"


def whole_stem(path: Path) -> str:
    """The name of a model's file without its ending, and without a part's number."""
    match = _PART.fullmatch(path.name)
    return path.stem if match is None else match["stem"]


def open_parts(path: Path) -> GgufFile:
    """A model's file, or all its files as one, without the keys that number them."""
    first = GgufFile.open(path)
    number, count, num_tensors = _place(first)
    if count <= 1:
        return first
    match = _PART.fullmatch(path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise FormatError(
            f"{path} is part {number + 1} of {count}, and its name does not say so",
            f"it needs the name that it was written with, ...-{number + 1:05}-of-{count:05}.gguf",
        )
    names = [_part_name(match["stem"], part, count) for part in range(1, count + 1)]
    if number != 0:
        raise FormatError(f"{path} is part {number + 1} of {count}", f"name the first: {names[0]}")
    tensors: dict[str, TensorEntry] = dict(first.tensors)
    elsewhere: dict[str, GgufFile] = {}
    for index, name in enumerate(names[1:], start=1):
        beside = path.with_name(name)
        if not beside.is_file():
            raise FormatError(f"{path} is part 1 of {count}, and {name} is not beside it")
        part = GgufFile.open(beside)
        if _place(part) != (index, count, num_tensors):
            raise FormatError(f"{beside} is no part {index + 1} of {count} of the model in {path}")
        for tensor, entry in part.tensors.items():
            if tensor in tensors:
                raise FormatError(f"{beside}: the tensor {tensor!r} is in another part too")
            tensors[tensor] = entry
            elsewhere[tensor] = part
    if len(tensors) != num_tensors:
        raise FormatError(f"{path}: its parts have {len(tensors)} tensors, not {num_tensors}")
    entries = tuple(entry for entry in first.entries if entry.key not in SPLIT_KEYS)
    return dataclasses.replace(first, entries=entries, tensors=tensors, elsewhere=elsewhere)


def _place(file: GgufFile) -> tuple[int, int, int]:
    """(split.no, split.count, split.tensors.count), of a whole model where the keys are missing."""
    metadata = file.metadata
    values = [
        metadata.get(key, default) for key, default in zip(SPLIT_KEYS, (0, 1, 0), strict=True)
    ]
    for key, value in zip(SPLIT_KEYS, values, strict=True):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise FormatError(f"{file.path}: {key} is {value!r}, not a number")
    number, count, num_tensors = values
    assert isinstance(number, int)
    assert isinstance(count, int)
    assert isinstance(num_tensors, int)
    if count > 1 and number >= count:
        raise FormatError(f"{file.path}: split.no is {number} of {count}")
    return number, count, num_tensors
