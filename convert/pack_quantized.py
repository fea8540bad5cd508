"""compressed-tensors' pack-quantized, 2 to 8 bits: what `qtool quantize` writes by default.

    weight_packed      int32 [out, ceil(in * bits / 32)]      rows of codes, a dense bitstream
    weight_scale       model dtype [out, groups]              [out, 1] where a row is one group
    weight_shape       int64 [2]                              out, in
    weight_zero_point  int32 [ceil(out * bits / 32), groups]  asymmetric only, packed down outputs

    W[o, k] = (q[o, k] - z[o, k // group]) * weight_scale[o, k // group]

Codes and zeros are stored unsigned, offset by 2**(bits-1), which is just how `QuantizedWeight`
holds them.

Before its 0.18.0 the library packed 3, 5, 6 and 7 bits as floor(32 / bits) codes a word. The two
layouts have different widths for all but tiny rows, so a file is read by what its shapes say; where
they do not tell, the file's version decides, and an old one is refused.

Source: vllm-project/compressed-tensors compressors/pack_quantized.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from qtool.convert.layer import (
    LayerSpec,
    Layout,
    check_group_index,
    expect_floating,
    expect_shape,
    is_act_order,
    malformed,
    require,
    whole_groups,
)
from qtool.convert.packing import WORD_BITS, num_words, pack, unpack, unpack_padded
from qtool.errors import QtoolError
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

SUFFIXES = (
    "weight_packed",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_g_idx",
)
DENSE_PACKING_SINCE = (0, 18)


def refuses(scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
    if scheme.group_size is not None and in_features % scheme.group_size:
        return f"{in_features} inputs are not a multiple of group size {scheme.group_size}"
    return None


def pack_layer(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Tensors of one linear; scales take the model's dtype, as loaders expect."""
    bits = weight.scheme.bits
    scales = weight.scales.to(dtype)
    if not bool(scales.isfinite().all()):
        raise QtoolError(
            f"a scale of {float(weight.scales.abs().max()):g} does not fit the model's {dtype}",
            "convert with a source in bfloat16 or float32",
        )
    tensors = {
        "weight_packed": pack(weight.codes, bits),
        "weight_scale": scales.contiguous(),
        "weight_shape": torch.tensor(weight.shape, dtype=torch.int64),
    }
    if weight.zeros is not None:
        tensors["weight_zero_point"] = pack(weight.zeros.t().contiguous(), bits).t().contiguous()
    return tensors


def shape_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec.

    Meta tensors will do, but for weight_shape, whose two values are read.
    """
    packed = require(tensors, "weight_packed", spec, ndim=2, dtype=torch.int32)
    declared = require(tensors, "weight_shape", spec, ndim=1)
    expect_shape(declared, (2,), spec, "weight_shape")
    if declared.dtype not in (torch.int64, torch.int32):
        raise malformed(spec, "weight_shape", f"is {declared.dtype}, not int64")
    out_features, in_features = (int(size) for size in declared)
    if out_features != packed.shape[0] or in_features < 1:
        raise malformed(
            spec,
            "weight_shape",
            f"says {out_features} x {in_features}, weight_packed is {list(packed.shape)}",
        )
    _is_padded_layout(packed, spec, in_features)
    groups = whole_groups(spec, "weight_shape", in_features)
    scales = tensors.get("weight_scale")
    if scales is None:
        raise malformed(spec, "weight_scale", "is missing")
    expect_floating(scales, spec, "weight_scale")
    if not (groups == 1 and scales.numel() == 1):  # strategy "tensor": one scale for all
        expect_shape(scales, (out_features, groups), spec, "weight_scale")
    if not spec.scheme.symmetric:
        zeros = require(tensors, "weight_zero_point", spec, ndim=2)
        if zeros.dtype == torch.int32:
            rows = num_words(out_features, spec.scheme.bits)
            expect_shape(zeros, (rows, groups), spec, "weight_zero_point")
        else:
            expect_shape(zeros, (out_features, groups), spec, "weight_zero_point")
            if zeros.dtype != torch.int8:
                raise malformed(spec, "weight_zero_point", f"is {zeros.dtype}")
    check_group_index(tensors, "weight_g_idx", in_features, spec)
    return out_features, in_features


def unpack_layer(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedWeight:
    out_features, in_features = shape_of(tensors, spec)
    if "weight_g_idx" in tensors and is_act_order(tensors["weight_g_idx"], spec.scheme):
        raise malformed(spec, "weight_g_idx", "puts inputs in groups out of order (act-order)")
    packed, bits = tensors["weight_packed"], spec.scheme.bits
    padded = _is_padded_layout(packed, spec, in_features)
    codes = (unpack_padded if padded else unpack)(packed, bits, in_features)
    groups = spec.scheme.num_groups(in_features)
    zeros = None
    if not spec.scheme.symmetric:
        zeros = _zeros(tensors["weight_zero_point"], bits, out_features)
    return QuantizedWeight(
        codes=codes,
        scales=tensors["weight_scale"].reshape(-1, groups).expand(out_features, groups),
        zeros=zeros,
        scheme=spec.scheme,
    )


LAYOUT = Layout(
    SUFFIXES,
    shape_of,
    unpack_layer,
    small=("weight_shape",),
    group_index="weight_g_idx",
    axes={
        "weight_packed": ("out", "in words"),
        "weight_scale": ("out", "groups"),
        "weight_zero_point": ("out words", "groups"),
    },
    states_shape="weight_shape",
)


def _zeros(stored: Tensor, bits: int, out_features: int) -> Tensor:
    """[out, groups] uint8; files of before packing hold signed int8 as they are."""
    if stored.dtype == torch.int32:
        return unpack(stored.t().contiguous(), bits, out_features).t().contiguous()
    zeros: Tensor = stored.to(torch.int16) + 2 ** (bits - 1)
    return zeros.to(torch.uint8)


def _is_padded_layout(packed: Tensor, spec: LayerSpec, in_features: int) -> bool:
    """Whether words are those of compressed-tensors before 0.18; FormatError where neither fits."""
    bits, width = spec.scheme.bits, packed.shape[1]
    dense_width = num_words(in_features, bits)
    padded_width = -(-in_features // (WORD_BITS // bits))
    if WORD_BITS % bits == 0 and width == dense_width:
        return False
    if width == dense_width != padded_width:
        return False
    if width == padded_width != dense_width:
        return True
    if width != dense_width:
        raise malformed(
            spec,
            "weight_packed",
            f"has {width} words a row; {in_features} codes of {bits} bits take {dense_width}",
        )
    if _version(spec.layout) < DENSE_PACKING_SINCE:
        raise malformed(
            spec,
            "weight_packed",
            f"was written by compressed-tensors {spec.layout}, which packed {bits} bits another "
            f"way than since 0.18, and {in_features} inputs are too few to tell which this is",
        )
    return False


def _version(text: str) -> tuple[int, int]:
    """(major, minor); a file that names no version is taken for a new one."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else DENSE_PACKING_SINCE
