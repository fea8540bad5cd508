"""A model's tensors over several files, as llama.cpp's gguf-split cuts them.

A file ends before the tensor with which its tensors, padded, would exceed the limit; metadata does
not count, and a tensor that is larger by itself has a file of its own. The first file has the
model's metadata; all have

    split.no             u16, from 0
    split.tensors.count  i32, of all files
    split.count          u16

Sources: tools/gguf-split/gguf-split.cpp for the cuts and the keys, gguf-py for that a model which
fits one file is one plain file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qtool.convert.gguf.container import KeyValue, pad_to
from qtool.convert.gguf.types import DEFAULT_ALIGNMENT, ValueType
from qtool.convert.gguf.writer import GgufLayout, TensorInfo
from qtool.errors import UsageError

NUMBER_KEY, COUNT_KEY, TENSORS_KEY = SPLIT_KEYS = (
    "split.no",
    "split.count",
    "split.tensors.count",
)
MAX_FILES = 99_999  # five digits in a name; llama.cpp counts in 16 bits


@dataclass(frozen=True, slots=True)
class SplitLimits:
    """Of one file; None for no limit. `metadata_first` keeps tensors out of the first."""

    max_bytes: int | None = None
    max_tensors: int | None = None
    metadata_first: bool = False


def split_layouts(
    entries: Sequence[KeyValue], tensors: Sequence[TensorInfo], limits: SplitLimits
) -> tuple[GgufLayout, ...]:
    """The files of a model, in order."""
    groups = _groups(tensors, limits)
    if len(groups) == 1:
        return (GgufLayout.of(entries, tensors),)
    if len(groups) > min(MAX_FILES, 0xFFFF):
        raise UsageError(
            f"the model would be in {len(groups):,} files, more than can be numbered",
            "give a larger --split-max-size or --split-max-tensors",
        )
    layouts = []
    for number, group in enumerate(groups):
        own = [entry for entry in entries if entry.key not in SPLIT_KEYS] if number == 0 else []
        keys = [
            KeyValue(NUMBER_KEY, number, ValueType.UINT16),
            KeyValue(TENSORS_KEY, len(tensors), ValueType.INT32),
            KeyValue(COUNT_KEY, len(groups), ValueType.UINT16),
        ]
        layouts.append(GgufLayout.of([*own, *keys], group))
    return tuple(layouts)


def _groups(tensors: Sequence[TensorInfo], limits: SplitLimits) -> list[list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    nbytes = 0
    for info in tensors:
        size = pad_to(info.nbytes, DEFAULT_ALIGNMENT)
        full = limits.max_bytes is not None and nbytes + size > limits.max_bytes
        full |= limits.max_tensors is not None and len(groups[-1]) == limits.max_tensors
        if full and groups[-1]:
            groups.append([])
            nbytes = 0
        groups[-1].append(info)
        nbytes += size
    return [[], *groups] if limits.metadata_first else groups
