"""bitsandbytes files: NF4 and FP4 (QLoRA's), with or without double quantization, and LLM.int8.

Four bits, in blocks of 64 (or another power of two) of the flattened weight:

    weight                    uint8 [out * in / 2, 1]   two codes a byte, the first in the high
                              bits; some files (bnb_4bit_quant_storage) call the bytes bfloat16
    weight.quant_map          float32 [16]              the value of each code
    weight.absmax             float32 [blocks]          the scale of each block, or, where doubly
                              uint8 [blocks]            quantized, its place in nested_quant_map
    weight.nested_quant_map   float32 [256]
    weight.nested_absmax      float32 [blocks / 256]
    weight.quant_state.bitsandbytes__nf4   uint8, a JSON text: shape, blocksize, dtype, and
                              nested_blocksize and nested_offset

    W.flatten()[i] = quant_map[code[i]] * scale[i // blocksize]
    scale[j] = nested_quant_map[absmax[j]] * nested_absmax[j // nested_blocksize] + nested_offset

Eight bits:

    weight  int8 [out, in]        SCB  float32 [out], the largest magnitude of each row

    W[o, k] = weight[o, k] * SCB[o] / 127

The library multiplies by SCB first and by 1/127 after; here the scale is rounded first, so that
weights may differ from its own by one unit in the last place of float32. Outliers are handled by
its matrix product and not by the file.

Sources: bitsandbytes functional.py (QuantState), backends/default/ops.py, nn/modules.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from qtool.convert.layer import (
    FloatSpec,
    LayerSpec,
    Layout,
    Packed,
    expect_shape,
    malformed,
    require,
)
from qtool.errors import UnsupportedModel
from qtool.scheme import FloatScheme, QuantScheme
from qtool.weights import CodebookWeight, QuantizedWeight

STATE = "weight.quant_state.bitsandbytes__"
NF4_STATE, FP4_STATE = f"{STATE}nf4", f"{STATE}fp4"
ROW_SCALES = "SCB"
MARKERS = (NF4_STATE, FP4_STATE, ROW_SCALES)
FOUR_BIT_SUFFIXES = (
    "weight",
    "weight.absmax",
    "weight.quant_map",
    "weight.nested_absmax",
    "weight.nested_quant_map",
    NF4_STATE,
    FP4_STATE,
)
EIGHT_BIT_SUFFIXES = ("weight", ROW_SCALES, "weight_format")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


@dataclass(frozen=True, slots=True)
class _State:
    """What the JSON text says; `nested_*` are None without double quantization."""

    shape: tuple[int, int]
    block_size: int
    nested_block_size: int | None
    nested_offset: float | None


def four_bit_shape(tensors: Mapping[str, Tensor], spec: FloatSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the JSON text, which is read."""
    state = _read_state(tensors, spec)
    count = state.shape[0] * state.shape[1]
    weight = require(tensors, "weight", spec, ndim=2)
    if 1 not in weight.shape or weight.nbytes != (count + 1) // 2:
        raise malformed(
            spec, "weight", f"has {weight.nbytes} bytes, {list(state.shape)} takes {count / 2:g}"
        )
    quant_map = require(tensors, "weight.quant_map", spec, ndim=1, dtype=torch.float32)
    expect_shape(quant_map, (16,), spec, "weight.quant_map")
    blocks = -(-count // state.block_size)
    nested = state.nested_block_size is not None
    scale_type = torch.uint8 if nested else torch.float32
    absmax = require(tensors, "weight.absmax", spec, ndim=1, dtype=scale_type)
    expect_shape(absmax, (blocks,), spec, "weight.absmax")
    if state.nested_block_size is not None:
        outer = require(tensors, "weight.nested_absmax", spec, ndim=1, dtype=torch.float32)
        outer_blocks = -(-blocks // state.nested_block_size)
        expect_shape(outer, (outer_blocks,), spec, "weight.nested_absmax")
        table = require(tensors, "weight.nested_quant_map", spec, ndim=1, dtype=torch.float32)
        expect_shape(table, (256,), spec, "weight.nested_quant_map")
    return state.shape


def unpack_four_bit(tensors: Mapping[str, Tensor], spec: FloatSpec) -> CodebookWeight:
    shape = four_bit_shape(tensors, spec)
    state = _read_state(tensors, spec)
    packed = tensors["weight"].flatten().view(torch.uint8)
    codes = torch.stack((packed >> 4, packed & 15), -1).flatten()[: shape[0] * shape[1]]
    scales, scale_bits = tensors["weight.absmax"], 32
    if state.nested_block_size is not None and state.nested_offset is not None:
        outer = tensors["weight.nested_absmax"].repeat_interleave(state.nested_block_size)
        inner = tensors["weight.nested_quant_map"][scales.int()]
        scales, scale_bits = inner * outer[: inner.numel()] + state.nested_offset, 8
    return CodebookWeight(
        codes=codes.view(shape),
        codebook=tensors["weight.quant_map"],
        scales=scales,
        scheme=four_bit_scheme(tensors, spec),
        scale_bits=scale_bits,
    )


def four_bit_scheme(tensors: Mapping[str, Tensor], spec: FloatSpec) -> FloatScheme:
    """The config's, with the block size, which only the JSON text has."""
    return FloatScheme(spec.scheme.name, (1, _read_state(tensors, spec).block_size))


def _read_state(tensors: Mapping[str, Tensor], spec: FloatSpec) -> _State:
    suffix = next((suffix for suffix in (NF4_STATE, FP4_STATE) if suffix in tensors), NF4_STATE)
    text = require(tensors, suffix, spec, ndim=1, dtype=torch.uint8)
    if text.is_meta:
        raise malformed(spec, suffix, f"is a text of {text.numel():,} bytes")
    try:
        state = json.loads(bytes(text.tolist()))
    except (ValueError, RecursionError) as error:
        raise malformed(spec, suffix, f"is no JSON: {error}") from None
    if not isinstance(state, dict):
        raise malformed(spec, suffix, "is no JSON object")
    shape = state.get("shape")
    if not (
        isinstance(shape, list)
        and len(shape) == 2
        and all(type(n) is int and 0 < n < 2**31 for n in shape)
    ):
        raise malformed(spec, suffix, f"has the shape {shape!r}")
    block_size, nested = state.get("blocksize"), state.get("nested_blocksize")
    if type(block_size) is not int or block_size not in BLOCK_SIZES:
        raise malformed(spec, suffix, f"has blocks of {block_size!r}")
    if nested is None:
        return _State((shape[0], shape[1]), block_size, None, None)
    offset = state.get("nested_offset")
    if type(nested) is not int or not 0 < nested <= 4096 or not isinstance(offset, float):
        raise malformed(spec, suffix, f"has nested blocks of {nested!r} from {offset!r}")
    return _State((shape[0], shape[1]), block_size, nested, offset)


def eight_bit_shape(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape (meta tensors will do)."""
    weight = require(tensors, "weight", spec, ndim=2, dtype=torch.int8)
    out_features, in_features = weight.shape
    if 0 in (out_features, in_features):
        raise malformed(spec, "weight", f"has shape {list(weight.shape)}")
    scales = require(tensors, ROW_SCALES, spec, ndim=1, dtype=torch.float32)
    expect_shape(scales, (out_features,), spec, ROW_SCALES)
    return out_features, in_features


def unpack_eight_bit(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedWeight:
    eight_bit_shape(tensors, spec)
    if "weight_format" in tensors and bool(tensors["weight_format"].any()):
        raise malformed(spec, "weight_format", "is not 0, that of rows")
    codes = tensors["weight"].view(torch.uint8) ^ 128
    return QuantizedWeight(codes, tensors[ROW_SCALES].unsqueeze(1) / 127, None, spec.scheme)


FOUR_BIT = Layout(
    FOUR_BIT_SUFFIXES,
    four_bit_shape,
    unpack_four_bit,
    small=(NF4_STATE, FP4_STATE),
    scheme_of=four_bit_scheme,
)
EIGHT_BIT = Layout(EIGHT_BIT_SUFFIXES, eight_bit_shape, unpack_eight_bit)


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
    """What a file's quantization_config says of the packed modules.

    where  the file that holds the config, for errors
    """
    if config.get("load_in_8bit") is True or config.get("_load_in_8bit") is True:
        scheme = QuantScheme(8, None)
        return {module: Packed(EIGHT_BIT, LayerSpec(module, scheme)) for module in modules}
    if config.get("load_in_4bit") is not True and config.get("_load_in_4bit") is not True:
        raise UnsupportedModel(f"{where}: bitsandbytes weights of neither 4 nor 8 bits")
    name = config.get("bnb_4bit_quant_type", "fp4")
    if name not in ("nf4", "fp4"):
        raise UnsupportedModel(f"{where}: bitsandbytes type {name!r} is not read", "read: nf4, fp4")
    scheme4 = FloatScheme(name, (1, 64))
    return {module: Packed(FOUR_BIT, FloatSpec(module, scheme4)) for module in modules}
