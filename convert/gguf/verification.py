"""Is a GGUF file whole, and are its weights finite?

A GGUF file carries no checksums. What can be known of one is that its header is sound, that its
tensors follow each other without holes or overlaps and end within the file (`container`), that the
parts of a split one are all there and belong together (`parts`), and that what every block decodes
to is a number: a damaged scale is NaN or infinite in one of 32 cases of float16.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, slab_rows
from qtool.convert.gguf.container import GgufFile, TensorEntry
from qtool.convert.gguf.parts import open_parts
from qtool.errors import VerificationFailed
from qtool.progress import track


class VerifiedGguf(NamedTuple):
    """num_unread: tensors of types that hold no weights, whose values were not looked at."""

    num_files: int
    num_tensors: int
    num_unread: int


def verify_gguf(path: Path) -> VerifiedGguf:
    """Raises FormatError where the file is not sound, VerificationFailed that names the tensors
    whose values are not finite.
    """
    file = open_parts(path)
    readable = [entry for entry in file.tensors.values() if entry.type.name in BLOCK_CODECS]
    bad = []
    for entry in track(readable, "checking tensors"):
        if not _is_finite(file, entry):
            bad.append(entry.name)
        file.release()
    if bad:
        raise VerificationFailed(f"{path}: not finite: {', '.join(bad)}")
    num_unread = len(file.tensors) - len(readable)
    return VerifiedGguf(len(file.paths), len(file.tensors), num_unread)


def _is_finite(file: GgufFile, entry: TensorEntry) -> bool:
    codec, data = BLOCK_CODECS[entry.type.name], file.data(entry.name)
    height = slab_rows(entry.shape[-1])
    return all(
        bool(codec.dequantize(data[begin : begin + height]).isfinite().all())
        for begin in range(0, len(data), height)
    )
