"""The formats of packed linears, and one view of any model on disk.

`FORMATS` is the table: a format is a pair of pure functions, `pack` and `unpack`, between its own
tensors and a `QuantizedWeight`, so that N formats cost 2N functions and never N squared. What
reads a model (convert, serve, eval) sees none of it: `open_weights` gives a `WeightReader`, the
same whether the file is a plain checkpoint, compressed-tensors, GPTQ, AWQ, Marlin or GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.checkpoint import Source
from qtool.convert import awq, compressed_tensors, gptq, marlin
from qtool.convert.layer import LayerSpec
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight, Weight


@dataclass(frozen=True, slots=True)
class Format:
    """One way of packing linears into a Hugging Face folder.

    suffixes             the tensors that one packed linear may have, after "<module>."; the first
                         is there always, and only there
    single_scheme        True where the file's config can hold one scheme only (gptq, awq)
    refuses              (scheme, out, in) -> why such a layer cannot be held, or None
    pack                 (weight, the model's dtype) -> suffix: tensor
    unpack               the inverse, from the tensors and what the config says of them
    shape_of             [out, in] from headers (meta tensors); raises FormatError where they differ
                         from the spec
    quantization_config  (packed module -> scheme, linears left in 16 bit) -> config.json's entry
    read_specs           (that entry, packed modules, the file's name) -> module: spec
    zeros_of             zero points from all tensors but the first, None where all are the
                         midpoint, so that the layer is symmetric whatever the config says; absent
                         where the config tells
    group_index          suffix of the tensor that puts inputs in groups (act-order), or None
    """

    name: str
    suffixes: tuple[str, ...]
    single_scheme: bool
    refuses: Callable[[QuantScheme, int, int], str | None]
    pack: Callable[[QuantizedWeight, torch.dtype], dict[str, Tensor]]
    unpack: Callable[[Mapping[str, Tensor], LayerSpec], QuantizedWeight]
    shape_of: Callable[[Mapping[str, Tensor], LayerSpec], tuple[int, int]]
    quantization_config: Callable[[Mapping[str, QuantScheme], Sequence[str]], dict[str, Any]]
    read_specs: Callable[[Mapping[str, Any], Sequence[str], str], dict[str, LayerSpec]]
    zeros_of: Callable[[Mapping[str, Tensor], LayerSpec], Tensor | None] | None = None
    group_index: str | None = None


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            name="compressed-tensors",
            suffixes=compressed_tensors.SUFFIXES,
            single_scheme=False,
            refuses=compressed_tensors.refuses,
            pack=compressed_tensors.pack_layer,
            unpack=compressed_tensors.unpack_layer,
            shape_of=compressed_tensors.shape_of,
            quantization_config=compressed_tensors.quantization_config,
            read_specs=compressed_tensors.read_specs,
            group_index="weight_g_idx",
        ),
        Format(
            name="gptq",
            suffixes=gptq.SUFFIXES,
            single_scheme=True,
            refuses=gptq.refuses,
            pack=gptq.pack_layer,
            unpack=gptq.unpack_layer,
            shape_of=gptq.shape_of,
            quantization_config=gptq.quantization_config,
            read_specs=gptq.read_specs,
            zeros_of=gptq.zeros_of,
            group_index="g_idx",
        ),
        Format(
            name="awq",
            suffixes=awq.SUFFIXES,
            single_scheme=True,
            refuses=awq.refuses,
            pack=awq.pack_layer,
            unpack=awq.unpack_layer,
            shape_of=awq.shape_of,
            quantization_config=awq.quantization_config,
            read_specs=awq.read_specs,
            zeros_of=awq.zeros_of,
        ),
        Format(
            name="marlin",
            suffixes=marlin.SUFFIXES,
            single_scheme=False,
            refuses=marlin.refuses,
            pack=marlin.pack_layer,
            unpack=marlin.unpack_layer,
            shape_of=marlin.shape_of,
            quantization_config=marlin.quantization_config,
            read_specs=marlin.read_specs,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Held:
    """What a file holds under one name, known without reading the weight itself.

    shape   [out, in] of a linear, whatever its packing; a plain tensor's own shape
    kind    "bfloat16", "int4-g128-sym" or a GGUF type such as "Q4_K"
    scheme  for integer-packed linears; None for plain tensors, GGUF blocks and act-order groups
    """

    shape: tuple[int, ...]
    kind: str
    scheme: QuantScheme | None = None


class WeightReader(Protocol):
    """Any model on disk, read lazily, under Hugging Face names."""

    @property
    def source(self) -> Source: ...

    @property
    def format(self) -> str:
        """ "dense", a name in FORMATS, or "gguf"."""
        ...

    @property
    def config(self) -> dict[str, Any]:
        """The Hugging Face config, without quantization_config."""
        ...

    def modules(self) -> list[str]:
        """Linears (and embeddings) held packed: "model.layers.0.mlp.up_proj"."""
        ...

    def tensor_names(self) -> list[str]:
        """Plain tensors: norms, biases, embeddings and linears left dense ("x.weight")."""
        ...

    def describe(self, name: str) -> Held:
        """Shape and kind of a name of `modules()` or `tensor_names()`, without reading it."""
        ...

    def weight(self, module: str) -> Weight:
        """The weight of a linear, packed or dense, by its module name."""
        ...

    def tensor(self, name: str) -> Tensor:
        """A plain tensor by its full name, or a packed module's ".weight", dequantized."""
        ...

    def has(self, name: str) -> bool:
        """Whether "x.weight" or "x.bias" is there; a packed module counts as having ".weight"."""
        ...


def open_weights(source: Source) -> WeightReader:
    """The reader for a model folder or a GGUF file, chosen by what it holds and not by its name."""
    # Both readers are built on this module; one is loaded, when a model of its kind is opened.
    if source.is_gguf:
        from qtool.convert.gguf.import_ import GgufWeights

        return GgufWeights(source)
    from qtool.convert.huggingface import CheckpointWeights

    return CheckpointWeights.open(source)
