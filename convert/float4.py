"""4-bit floats: compressed-tensors' nvfp4-pack-quantized and mxfp4-pack-quantized.

    weight_packed        uint8 [out, in / 2]     input 2i in the low four bits, 2i + 1 in the high
    weight_scale         nvfp4: float8_e4m3fn [out, in / 16]
                         mxfp4: uint8 [out, in / 32], 2**(byte - 127)
    weight_global_scale  nvfp4: float32 [1], what every scale is divided by

    W[o, k] = E2M1[code] * weight_scale[o, k // group] / weight_global_scale

E2M1 has a sign, two bits of exponent and one of mantissa: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their
negatives. Scales are divided by the global one in float32, as compressed-tensors and vLLM do, and
not the product, so that the weights are theirs bit for bit.

Source: compressed-tensors compressors/nvfp4, compressors/mxfp4.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.convert.float8 import check_scale_type, widened
from qtool.convert.layer import FloatSpec, Layout, expect_shape, malformed, require
from qtool.weights import CodebookWeight

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
NVFP4, MXFP4 = "nvfp4", "mxfp4"
GROUP_SIZES = {NVFP4: 16, MXFP4: 32}
SUFFIXES = ("weight_packed", "weight_scale", "weight_global_scale", "input_global_scale")


def shape_of(tensors: Mapping[str, Tensor], spec: FloatSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec (meta tensors will do)."""
    packed = require(tensors, "weight_packed", spec, ndim=2, dtype=torch.uint8)
    out_features, in_features = packed.shape[0], 2 * packed.shape[1]
    group = GROUP_SIZES[spec.scheme.name]
    if out_features == 0 or in_features == 0 or in_features % group:
        raise malformed(spec, "weight_packed", f"has {in_features} inputs, not groups of {group}")
    scales = require(tensors, "weight_scale", spec, ndim=2)
    expect_shape(scales, (out_features, in_features // group), spec, "weight_scale")
    if spec.scheme.name == MXFP4:
        check_scale_type(scales, spec, "weight_scale")
        return out_features, in_features
    if scales.dtype not in (torch.float8_e4m3fn, torch.bfloat16, torch.float16, torch.float32):
        raise malformed(spec, "weight_scale", f"is {scales.dtype}, not float8_e4m3fn")
    overall = tensors.get("weight_global_scale")
    if overall is None or overall.numel() != 1 or overall.dtype != torch.float32:
        raise malformed(spec, "weight_global_scale", "is not one float32")
    return out_features, in_features


def unpack_layer(tensors: Mapping[str, Tensor], spec: FloatSpec) -> CodebookWeight:
    out_features, in_features = shape_of(tensors, spec)
    packed = tensors["weight_packed"]
    codes = torch.stack((packed & 15, packed >> 4), -1).view(out_features, in_features)
    scales = widened(tensors["weight_scale"]).float()
    if spec.scheme.name == NVFP4:
        scales = scales / tensors["weight_global_scale"].view(())
    codebook = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return CodebookWeight(codes, codebook, scales.flatten(), spec.scheme, scale_bits=8)


LAYOUT = Layout(
    SUFFIXES,
    shape_of,
    unpack_layer,
    axes={"weight_packed": ("out", "in pairs"), "weight_scale": ("out", "groups")},
)
