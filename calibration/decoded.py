"""A checkpoint whose linears are stored as small floats, seen as one of 16-bit weights.

Some models are published in 8- or 4-bit floats alone. They are decoded a tensor at a time, as they
are read, and quantized from there. Integers are refused: their rounding was chosen for them, and a
second one on top loses more than either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from qtool.checkpoint import Checkpoint, TensorInfo
from qtool.convert.formats import WeightReader, open_weights
from qtool.convert.mxfp4_experts import (
    BLOCKS,
    SCALES,
    is_mxfp4,
    packed_experts,
    unpack_experts,
)
from qtool.source import Source
from qtool.units import size_text

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


@dataclass(frozen=True, slots=True)
class DecodedExperts(Checkpoint):
    """A checkpoint of MXFP4 experts (gpt-oss) as one of 16-bit experts.

    source   as it lies on disk
    experts  parameters that are decoded
    """

    source: Checkpoint | None = None
    experts: frozenset[str] = frozenset()

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> DecodedExperts:
        config, dtype = _without_quantization(checkpoint.config)
        shapes = packed_experts(checkpoint.tensors)
        infos = {
            name: info
            for name, info in checkpoint.tensors.items()
            if name.removesuffix(BLOCKS) not in shapes and name.removesuffix(SCALES) not in shapes
        }
        for name, shape in shapes.items():
            nbytes = math.prod(shape) * dtype.itemsize
            stored = checkpoint.tensors[name + BLOCKS]
            infos[name] = replace(stored, name=name, dtype=dtype, shape=shape, nbytes=nbytes)
        return cls(
            checkpoint.folder,
            config,
            infos,
            checkpoint.mapped,
            source=checkpoint,
            experts=frozenset(shapes),
        )

    @property
    def growth(self) -> str:
        """What becomes of them in an artifact, for the plan."""
        assert self.source is not None
        packed = sum(
            self.source.tensors[name + part].nbytes
            for name in self.experts
            for part in (BLOCKS, SCALES)
        )
        plain = sum(self.tensors[name].nbytes for name in self.experts)
        return (
            f"the experts, {size_text(packed)} of MXFP4 in the source, are written in 16 bit, "
            f"{size_text(plain)}: no format that loaders read holds them packed beside other "
            "packed weights"
        )

    def tensor(self, name: str) -> Tensor:
        assert self.source is not None
        if name not in self.experts:
            return self.source.tensor(name)
        blocks, scales = (self.source.tensor(name + part) for part in (BLOCKS, SCALES))
        return unpack_experts(blocks, scales, self.tensors[name].dtype)


def _without_quantization(config: Mapping[str, Any]) -> tuple[dict[str, Any], torch.dtype]:
    """A config of the decoded model, and the type that its weights come in."""
    plain = {key: value for key, value in config.items() if key != "quantization_config"}
    name = str(plain.get("dtype") or plain.get("torch_dtype") or "bfloat16")
    return plain, getattr(torch, name.removeprefix("torch."), torch.bfloat16)


def open_checkpoint(source: Source) -> Checkpoint:
    """A model folder; where all of its packed linears are small floats, decoded."""
    checkpoint = Checkpoint.open(source.path)
    if is_mxfp4(checkpoint.config):
        return DecodedExperts.of(checkpoint)
    if not isinstance(checkpoint.config.get("quantization_config"), dict):
        return checkpoint
    reader = open_weights(source)
    modules = reader.modules()
    kinds = [reader.describe(module).kind for module in modules]
    if not modules or not all(kind.startswith(_FLOATS) for kind in kinds):
        return checkpoint
    config, dtype = _without_quantization(checkpoint.config)
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
