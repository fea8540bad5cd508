"""A checkpoint whose linears are stored as small floats, seen as one of 16-bit weights.

Some models are published in 8- or 4-bit floats alone. They are decoded a tensor at a time, as they
are read, and quantized from there. Integers are refused: their rounding was chosen for them, and a
second one on top loses more than either.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.convert.formats import WeightReader, open_weights
from qtool.source import Source

_FLOATS = ("fp8", "nvfp4", "mxfp4", "mxfp8")


@dataclass(frozen=True, slots=True)
class DecodedCheckpoint(Checkpoint):
    """tensors  as they come out: "x.weight" of the decoded shape and type, scales left out"""

    reader: WeightReader | None = None
    decoded: frozenset[str] = frozenset()

    def tensor(self, name: str) -> Tensor:
        module = name.removesuffix(".weight")
        if module not in self.decoded:
            # Named, because super() does not work in classes that have slots.
            return Checkpoint.tensor(self, name)
        assert self.reader is not None
        return self.reader.weight(module).dequantize(self.tensors[name].dtype)


def open_checkpoint(source: Source) -> Checkpoint:
    """A model folder; where all of its packed linears are small floats, decoded."""
    checkpoint = Checkpoint.open(source.path)
    if not isinstance(checkpoint.config.get("quantization_config"), dict):
        return checkpoint
    reader = open_weights(source)
    modules = reader.modules()
    kinds = [reader.describe(module).kind for module in modules]
    if not modules or not all(kind.startswith(_FLOATS) for kind in kinds):
        return checkpoint
    config: dict[str, Any] = dict(checkpoint.config)
    del config["quantization_config"]
    name = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
    dtype = getattr(torch, name.removeprefix("torch."), torch.bfloat16)
    infos: dict[str, TensorInfo] = {
        name: checkpoint.tensors[name] for name in reader.tensor_names() if name in checkpoint
    }
    for module in modules:
        shape = reader.describe(module).shape
        stored = next(
            info for key, info in checkpoint.tensors.items() if key.startswith(f"{module}.weight")
        )
        nbytes = shape[0] * shape[1] * dtype.itemsize
        infos[f"{module}.weight"] = replace(
            stored, name=f"{module}.weight", dtype=dtype, shape=tuple(shape), nbytes=nbytes
        )
    return DecodedCheckpoint(
        checkpoint.folder,
        config,
        infos,
        checkpoint.mapped,
        reader=reader,
        decoded=frozenset(modules),
    )
