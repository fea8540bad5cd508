"""8-bit floats with scales: compressed-tensors' float-quantized and `quant_method: fp8`.

    weight            float8_e4m3fn [out, in]
    weight_scale      [out, 1], [1] or a scalar: one a row, or one for all
    weight_scale_inv  [ceil(out / 128), ceil(in / 128)]: one a block (in spite of its name the
                      factor, not its inverse); compressed-tensors calls blocks' scales weight_scale

    W[o, k] = weight[o, k] * scale[block of o, block of k]

Scales are float32 or the model's type; with `scale_fmt: ue8m0` and in compressed-tensors'
mxfp8-quantized they are powers of two, one byte each, 2**(byte - 127), the byte 255 being NaN.
The scales of static activations (`input_scale`, `activation_scale`) belong to the runtimes that
quantize activations too, and are not carried anywhere.

Sources: transformers integrations/finegrained_fp8.py, vLLM quantization/fp8.py,
compressed-tensors compressors/naive_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.convert.layer import FloatSpec, Layout, Packed, expect_shape, malformed, require
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import FloatScheme
from qtool.weights import FLOAT8_TYPES, Float8Weight, num_blocks

# The first that is there holds the scales.
SCALES = ("weight_scale_inv", "weight_scale")
SUFFIXES = (
    "weight",
    *SCALES,
    "input_scale",
    "activation_scale",
    "weight_zero_point",
    "input_zero_point",
)
SCALE_TYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.float8_e8m0fnu,
)


def shape_of(tensors: Mapping[str, Tensor], spec: FloatSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec (meta tensors will do)."""
    weight = require(tensors, "weight", spec, ndim=2)
    if weight.dtype not in FLOAT8_TYPES:
        raise malformed(spec, "weight", f"is {weight.dtype}, not an 8-bit float")
    shape = weight.shape[0], weight.shape[1]
    if 0 in shape:
        raise malformed(spec, "weight", f"has shape {list(shape)}")
    suffix = _scales_suffix(tensors, spec)
    scales = tensors[suffix]
    check_scale_type(scales, spec, suffix)
    blocks = num_blocks(shape, spec.scheme)
    if scales.ndim < 2 and scales.numel() == blocks[0] * blocks[1] and 1 in blocks:
        return shape
    expect_shape(scales, blocks, spec, suffix)
    return shape


def unpack_layer(tensors: Mapping[str, Tensor], spec: FloatSpec) -> Float8Weight:
    shape = shape_of(tensors, spec)
    scales = widened(tensors[_scales_suffix(tensors, spec)])
    blocks = num_blocks(shape, spec.scheme)
    return Float8Weight(tensors["weight"], scales.reshape(blocks), spec.scheme)


LAYOUT = Layout(SUFFIXES, shape_of, unpack_layer)


def _scales_suffix(tensors: Mapping[str, Tensor], spec: FloatSpec) -> str:
    found = next((suffix for suffix in SCALES if suffix in tensors), None)
    if found is None:
        raise malformed(spec, "weight", "is there without its scales")
    return found


def check_scale_type(scales: Tensor, spec: FloatSpec, suffix: str) -> None:
    if scales.dtype not in SCALE_TYPES:
        raise malformed(spec, suffix, f"is {scales.dtype}, which no scale is")


def widened(scales: Tensor) -> Tensor:
    """Scales as they are used: bytes of exponents as float32, other types as they are."""
    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    return scales.float() if scales.dtype == torch.float8_e8m0fnu else scales


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
    """What a `quant_method: fp8` says of the packed modules: one scheme for all of them.

    where  the file that holds the config, for errors
    """
    if config.get("expert_dtype", "fp8") != "fp8":
        raise UnsupportedModel(f"{where}: experts in {config['expert_dtype']!r} are not read")
    scheme = FloatScheme("fp8", block_of(config.get("weight_block_size"), where))
    return {module: Packed(LAYOUT, FloatSpec(module, scheme)) for module in modules}


def block_of(value: object, where: str) -> tuple[int | None, int | None]:
    """(outputs, inputs) of a block as a config names it; None is one scale for all."""
    if value is None:
        return None, None
    if isinstance(value, list | tuple) and len(value) == 2:
        rows, columns = value
        if type(rows) is int and type(columns) is int and min(rows, columns) > 0:
            return rows, columns
    raise FormatError(f"{where}: a block of {value!r} is not two positive numbers")
