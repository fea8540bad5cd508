"""How large a model is: bytes of its weight files, weights they stand for, and bits per weight.

Bits per weight are of the file as it lies on disk: scales, zero points and padding included, and
the embeddings and norms that stay in 16 bit. "int4" with groups of 128 is 4.125 bits in the
quantized linears and, in a small model with a large vocabulary, far more over the whole file.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from qtool.artifact import sha256
from qtool.checkpoint import Checkpoint
from qtool.convert.formats import WeightReader
from qtool.convert.gguf.import_ import FLOAT_DTYPES
from qtool.convert.gguf.parts import open_parts
from qtool.convert.huggingface import CheckpointWeights
from qtool.source import Source


class ModelSize(NamedTuple):
    """Bytes of the weight files; of the tensors in them, without headers and a GGUF's vocabulary;
    the weights that they stand for; and the packed weights' own bits.
    """

    file_bytes: int
    tensor_bytes: int
    num_weights: int
    quantized_bits_per_weight: float | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.tensor_bytes / self.num_weights


def measure(reader: WeightReader) -> ModelSize:
    """From headers alone: nothing is read of the weights."""
    packed = {name: math.prod(reader.describe(name).shape) for name in reader.modules()}
    plain = sum(math.prod(reader.describe(name).shape) for name in reader.tensor_names())
    tensor_bytes, packed_bytes = _tensor_bytes(reader, packed)
    return ModelSize(
        file_bytes=sum(path.stat().st_size for path in weight_files(reader.source)),
        tensor_bytes=tensor_bytes,
        num_weights=sum(packed.values()) + plain,
        quantized_bits_per_weight=8 * packed_bytes / sum(packed.values()) if packed else None,
    )


def _tensor_bytes(reader: WeightReader, packed: Collection[str]) -> tuple[int, int]:
    """Of all tensors, and of those that hold packed weights with their scales and zeros."""
    if reader.source.is_gguf:
        entries = open_parts(reader.source.path).tensors.values()
        sizes = [(entry.nbytes, entry.type.name not in FLOAT_DTYPES) for entry in entries]
    else:
        assert isinstance(reader, CheckpointWeights), type(reader)
        parts = {info.name for module in packed for info in reader.parts(module)}
        tensors = reader.checkpoint.tensors
        sizes = [(info.nbytes, name in parts) for name, info in tensors.items()]
    return sum(size for size, _ in sizes), sum(size for size, is_packed in sizes if is_packed)


def weight_files(source: Source) -> Sequence[Path]:
    """The files that hold the weights."""
    if source.is_gguf:
        return open_parts(source.path).paths
    checkpoint = Checkpoint.open(source.path)
    return sorted({info.file for info in checkpoint.tensors.values()})


def weight_hashes(source: Source) -> dict[str, str]:
    return {path.name: sha256(path) for path in weight_files(source)}
