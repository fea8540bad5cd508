"""compressed-tensors' int-quantized and naive-quantized integers: W8A8, a code in every byte.

    weight             int8 [out, in]       signed codes
    weight_scale       [out, groups], [out, 1] or one for all
    weight_zero_point  int8 [out, groups]   asymmetric only, signed

    W[o, k] = (weight[o, k] - zero[o, k // group]) * weight_scale[o, k // group]

Widths below eight bits take a byte as well. Codes and zeros become unsigned by adding
2**(bits - 1). `input_scale` and `input_zero_point` of static activations are not carried anywhere.

Source: compressed-tensors compressors/naive_quantized.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.convert.layer import (
    LayerSpec,
    Layout,
    expect_floating,
    expect_shape,
    malformed,
    require,
    whole_groups,
)
from qtool.weights import QuantizedWeight

SUFFIXES = (
    "weight",
    "weight_scale",
    "weight_zero_point",
    "input_scale",
    "input_zero_point",
)


def shape_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec (meta tensors will do)."""
    weight = require(tensors, "weight", spec, ndim=2, dtype=torch.int8)
    out_features, in_features = weight.shape
    if out_features == 0:
        raise malformed(spec, "weight", f"has shape {list(weight.shape)}")
    groups = whole_groups(spec, "weight", in_features)
    _check_grid(tensors, "weight_scale", (out_features, groups), spec)
    expect_floating(tensors["weight_scale"], spec, "weight_scale")
    if not spec.scheme.symmetric:
        _check_grid(tensors, "weight_zero_point", (out_features, groups), spec)
        if tensors["weight_zero_point"].dtype != torch.int8:
            raise malformed(spec, "weight_zero_point", "is not int8")
    return out_features, in_features


def unpack_layer(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedWeight:
    out_features, in_features = shape_of(tensors, spec)
    groups = spec.scheme.num_groups(in_features)
    zeros = None
    if not spec.scheme.symmetric:
        zeros = _unsigned(tensors, "weight_zero_point", spec).reshape(-1, groups)
        zeros = zeros.expand(out_features, groups)
    return QuantizedWeight(
        codes=_unsigned(tensors, "weight", spec),
        scales=tensors["weight_scale"].reshape(-1, groups).expand(out_features, groups),
        zeros=zeros,
        scheme=spec.scheme,
    )


LAYOUT = Layout(
    SUFFIXES,
    shape_of,
    unpack_layer,
    axes={
        "weight": ("out", "in"),
        "weight_scale": ("out", "groups"),
        "weight_zero_point": ("out", "groups"),
    },
)


def _check_grid(
    tensors: Mapping[str, Tensor], suffix: str, shape: tuple[int, int], spec: LayerSpec
) -> None:
    found = tensors.get(suffix)
    if found is None:
        raise malformed(spec, suffix, "is missing")
    if not (shape[1] == 1 and found.numel() == 1):  # strategy "tensor": one for all
        expect_shape(found, shape, spec, suffix)


def _unsigned(tensors: Mapping[str, Tensor], suffix: str, spec: LayerSpec) -> Tensor:
    """Signed codes [...] int8 -> [...] uint8 around the midpoint."""
    codes = tensors[suffix].to(torch.int16) + spec.scheme.midpoint
    if spec.scheme.bits < 8 and bool(((codes < 0) | (codes >= spec.scheme.num_codes)).any()):
        raise malformed(spec, suffix, f"holds values beyond {spec.scheme.bits} bits")
    return codes.to(torch.uint8)
