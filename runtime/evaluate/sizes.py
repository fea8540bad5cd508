"""How large a model is: bytes of its weight files, weights they stand for, and bits per weight.

Bits per weight are of the file as it lies on disk: scales, zero points and padding included, and
the embeddings and norms that stay in 16 bit. "int4" with groups of 128 is 4.125 bits in the
quantized linears and, in a small model with a large vocabulary, far more over the whole file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from qtool.artifact import sha256
from qtool.checkpoint import Checkpoint, Source
from qtool.convert.formats import WeightReader


class ModelSize(NamedTuple):
    """num_bytes of tensors on disk; num_weights of the model; the quantized linears' own bits."""

    num_bytes: int
    num_weights: int
    quantized_bits_per_weight: float | None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_weights


def measure(reader: WeightReader) -> ModelSize:
    """From headers alone, but for GGUF, whose packed tensors are mapped to take their size."""
    packed = {name: math.prod(reader.describe(name).shape) for name in reader.modules()}
    plain = sum(math.prod(reader.describe(name).shape) for name in reader.tensor_names())
    total = sum(packed.values()) + plain
    if reader.source.is_gguf:
        packed_bytes = sum(reader.weight(name).nbytes for name in packed)
        num_bytes = reader.source.path.stat().st_size
    else:
        checkpoint = Checkpoint.open(reader.source.path)
        packed_bytes = sum(
            info.nbytes
            for name, info in checkpoint.tensors.items()
            if name.rpartition(".")[0] in packed and not name.endswith(".bias")
        )
        num_bytes = checkpoint.nbytes
    own = 8 * packed_bytes / sum(packed.values()) if packed else None
    return ModelSize(num_bytes, total, own)


def weight_files(source: Source) -> Sequence[Path]:
    """The files that hold the weights."""
    if source.is_gguf:
        return [source.path]
    checkpoint = Checkpoint.open(source.path)
    return sorted({info.file for info in checkpoint.tensors.values()})


def weight_hashes(source: Source) -> dict[str, str]:
    return {path.name: sha256(path) for path in weight_files(source)}
