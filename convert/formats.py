"""The formats of packed linears, and one view of any model on disk.

`FORMATS` is the table of what can be written: a format is a pair of pure functions, `pack` and the
`unpack` of its layout, between its own tensors and a `QuantizedWeight`, so that N formats cost 2N
functions and never N squared. More can be read than written (sources.py). What reads a model
(convert, serve, eval) sees none of it: `open_weights` gives a `WeightReader`, the same whether the
file is a plain checkpoint, compressed-tensors, GPTQ, AWQ, Marlin, FP8, bitsandbytes or GGUF.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qtool.convert import awq, compressed_tensors, gptq, marlin, pack_quantized
from qtool.convert.layer import Layout
from qtool.scheme import QuantScheme
from qtool.source import Source
from qtool.weights import QuantizedWeight, Weight


@dataclass(frozen=True, slots=True)
class Format:
    """One way of packing linears into a Hugging Face folder.

    layout               how one packed linear is read; the first of its suffixes is there always,
                         and only there
    single_scheme        True where the file's config can hold one scheme only (gptq, awq)
    refuses              (scheme, out, in) -> why such a layer cannot be held, or None
    pack                 (weight, the model's dtype) -> suffix: tensor
    quantization_config  (packed module -> scheme, linears left in 16 bit) -> config.json's entry
    """

    name: str
    layout: Layout
    single_scheme: bool
    refuses: Callable[[QuantScheme, int, int], str | None]
    pack: Callable[[QuantizedWeight, torch.dtype], dict[str, Tensor]]
    quantization_config: Callable[[Mapping[str, QuantScheme], Sequence[str]], dict[str, Any]]

    @property
    def suffixes(self) -> tuple[str, ...]:
        """The tensors that one packed linear may have, after "<module>."."""
        return self.layout.suffixes

    @property
    def unpack(self) -> Callable[[Mapping[str, Tensor], Any], Weight]:
        """The weight, from the tensors and what the config says of them."""
        return self.layout.unpack


FORMATS: dict[str, Format] = {
    format.name: format
    for format in (
        Format(
            name="compressed-tensors",
            layout=pack_quantized.LAYOUT,
            single_scheme=False,
            refuses=pack_quantized.refuses,
            pack=pack_quantized.pack_layer,
            quantization_config=compressed_tensors.quantization_config,
        ),
        Format(
            name="gptq",
            layout=gptq.LAYOUT,
            single_scheme=True,
            refuses=gptq.refuses,
            pack=gptq.pack_layer,
            quantization_config=gptq.quantization_config,
        ),
        Format(
            name="awq",
            layout=awq.LAYOUT,
            single_scheme=True,
            refuses=awq.refuses,
            pack=awq.pack_layer,
            quantization_config=awq.quantization_config,
        ),
        Format(
            name="marlin",
            layout=marlin.LAYOUT,
            single_scheme=False,
            refuses=marlin.refuses,
            pack=marlin.pack_layer,
            quantization_config=marlin.quantization_config,
        ),
    )
}


# Ends the kind of a linear whose groups take inputs out of order.
ACT_ORDER = "act-order"
PLAIN_KINDS = ("bfloat16", "float16", "float32", "float64", "int64", "int32", "int16", "bool")


@dataclass(frozen=True, slots=True)
class Held:
    """What a file holds under one name, known without reading the weight itself.

    shape   [out, in] of a linear, whatever its packing; a plain tensor's own shape
    kind    "bfloat16", "int4-g128-sym", "fp8-128x128" or a GGUF type such as "Q4_K"
    scheme  for integer-packed linears; None for plain tensors, floats, GGUF blocks and act-order
            groups
    scales  the number type that its scales are stored in, where it has scales of their own
    """

    shape: tuple[int, ...]
    kind: str
    scheme: QuantScheme | None = None
    scales: str | None = None

    @property
    def is_plain(self) -> bool:
        """Whether it is values of a number type, and not codes with scales."""
        return self.kind in PLAIN_KINDS


class WeightReader(Protocol):
    """Any model on disk, read lazily, under Hugging Face names."""

    @property
    def source(self) -> Source: ...

    @property
    def format(self) -> str:
        """ "dense", a name in SOURCES (those of FORMATS and more), or "gguf"."""
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
