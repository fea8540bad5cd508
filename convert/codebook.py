"""Linears whose rows each have a table of their own: what `qtool quantize --recipe codebook` makes.

    weight_codes   int32 [out, in * bits / 32]  a dense little-endian bitstream a row (packing.py)
    weight_tables  fp16 or fp32 [out, 2**bits]  the values of a row's codes
    weight_shape   int64 [2]                    [out, in]

    W[o, k] = weight_tables[o, code[o, k]]

No other loader reads tables that differ from row to row: vLLM has dropped SqueezeLLM's, and
compressed-tensors has but a draft of tables for tiles of 8 x 64. So it is written under a key of
its own, `quant_method: "qtool-codebook"`, with a version; `qtool convert --to hf` makes a model of
it that every loader takes.

A row of 4096 inputs in four bits takes 4 + 256 / 4096 = 4.06 bits a weight: fewer than groups of
128 with their scales (4.125), so long as rows are longer than 2048.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.convert.layer import FloatSpec, Layout, Packed, expect_shape, malformed, require
from qtool.convert.own_config import OwnConfig
from qtool.convert.packing import num_words, pack, unpack
from qtool.errors import FormatError
from qtool.scheme import FloatScheme, codebook_scheme
from qtool.weights import TableWeight

QUANT_METHOD = "qtool-codebook"
CONFIG = OwnConfig(
    QUANT_METHOD,
    version=1,
    name="codebook",
    hint="read it with the qtool that wrote it, or quantize the original again",
)
SUFFIXES = ("weight_codes", "weight_tables", "weight_shape")
MARKER = "weight_tables"
BITS = (2, 3, 4)


def pack_layer(weight: TableWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """`dtype` is not used: tables are stored as the solver rounded them."""
    return {
        "weight_codes": pack(weight.codes, weight.bits),
        "weight_tables": weight.tables.contiguous(),
        "weight_shape": torch.tensor(weight.shape),
    }


def shape_of(tensors: Mapping[str, Tensor], spec: FloatSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against `weight_shape`, which is read."""
    bits = _bits(spec.scheme)
    stated = require(tensors, "weight_shape", spec, ndim=1, dtype=torch.int64)
    expect_shape(stated, (2,), spec, "weight_shape")
    if stated.is_meta:
        raise malformed(spec, "weight_shape", "is larger than a shape")
    out_features, in_features = stated.tolist()
    if out_features < 1 or in_features < 1:
        raise malformed(spec, "weight_shape", f"is {[out_features, in_features]}")
    codes = require(tensors, "weight_codes", spec, ndim=2, dtype=torch.int32)
    expect_shape(codes, (out_features, num_words(in_features, bits)), spec, "weight_codes")
    tables = require(tensors, MARKER, spec, ndim=2)
    expect_shape(tables, (out_features, 2**bits), spec, MARKER)
    if tables.dtype not in (torch.float16, torch.float32):
        raise malformed(spec, MARKER, f"is {tables.dtype}, not torch.float16 or torch.float32")
    return out_features, in_features


def unpack_layer(tensors: Mapping[str, Tensor], spec: FloatSpec) -> TableWeight:
    _, in_features = shape_of(tensors, spec)
    codes = unpack(tensors["weight_codes"], _bits(spec.scheme), in_features)
    return TableWeight(codes, tensors[MARKER], spec.scheme)


LAYOUT = Layout(
    SUFFIXES, shape_of, unpack_layer, small=("weight_shape",), states_shape="weight_shape"
)


def _bits(scheme: FloatScheme) -> int:
    assert scheme.table_bits is not None, scheme
    return scheme.table_bits


def quantization_config(
    quantized: Mapping[str, FloatScheme], dense: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json: the bits of every packed layer by name."""
    return CONFIG.entry({module: _bits(scheme) for module, scheme in quantized.items()}, dense)


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
    """What a file's quantization_config says of each packed module."""
    layers = CONFIG.layers(config, modules, where)
    packed = {}
    for module in modules:
        bits = layers.get(module)
        if type(bits) is not int or bits not in BITS:
            known = ", ".join(map(str, BITS))
            raise FormatError(f"{where}: {module} has codes of {bits!r} bits; read: {known}")
        packed[module] = Packed(LAYOUT, FloatSpec(module, codebook_scheme(bits)))
    return packed
