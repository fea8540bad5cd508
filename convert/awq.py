"""AWQ files: AutoAWQ's GEMM layout, `quant_method: awq`, `version: gemm`. Four bits only.

    qweight  int32 [in, out / 8]      word c of a row holds outputs 8c .. 8c + 7
    qzeros   int32 [groups, out / 8]  the same packing, zero points as they are
    scales   fp16  [groups, out]

    W[o, k] = (q[o, k] - z[o, k // group]) * scales[k // group, o]

Nibble i of a word (bits 4i .. 4i + 3) holds output 8c + [0, 2, 4, 6, 1, 3, 5, 7][i]: the order in
which the kernel's half2 pairs come out of one mask and four shifts. So outputs 0..7 with codes
0..7 make the word 0x75316420.

The format is asymmetric; a symmetric weight is written with every zero at 8, and such a file is
read back as symmetric, so that it can go on to Marlin or Q4_0.

Sources: casper-hansen/AutoAWQ awq/modules/linear/gemm.py and awq/utils/packing_utils.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool.convert.layer import (
    LayerSpec,
    Layout,
    Packed,
    expect_floating,
    expect_shape,
    half_scales,
    one_scheme,
    refuse_groups,
    require,
    scheme_from_config,
    whole_groups,
)
from qtool.convert.packing import AWQ_INVERSE, AWQ_ORDER, pack, reorder, unpack
from qtool.errors import UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales")
GROUP_SIZES = (32, 64, 128)
CODES_PER_WORD = 8


def refuses(scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
    if scheme.bits != 4:
        return f"AWQ files hold 4 bits, not {scheme.bits}"
    if out_features % CODES_PER_WORD:
        return f"AWQ packs outputs by 8, and there are {out_features}"
    return refuse_groups("AWQ", scheme, in_features, GROUP_SIZES)


def pack_layer(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """GEMM tensors of one linear; `dtype` is not used, the layout's scales are fp16."""
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, weight.scheme.midpoint, dtype=torch.uint8)
    return {
        "qweight": _pack_outputs(weight.codes),
        "qzeros": _pack_outputs(zeros),
        "scales": half_scales(weight.scales).t().contiguous(),
    }


def shape_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec (meta tensors will do)."""
    qweight = require(tensors, "qweight", spec, ndim=2, dtype=torch.int32)
    in_features, out_features = qweight.shape[0], qweight.shape[1] * CODES_PER_WORD
    groups = whole_groups(spec, "qweight", in_features)
    scales = require(tensors, "scales", spec, ndim=2)
    expect_floating(scales, spec, "scales")
    expect_shape(scales, (groups, out_features), spec, "scales")
    qzeros = require(tensors, "qzeros", spec, ndim=2, dtype=torch.int32)
    expect_shape(qzeros, (groups, out_features // CODES_PER_WORD), spec, "qzeros")
    return out_features, in_features


def zeros_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor | None:
    """Zero points [out, groups] uint8, or None where all are the midpoint (a symmetric weight)."""
    zeros = _unpack_outputs(tensors["qzeros"])
    return None if bool((zeros == spec.scheme.midpoint).all()) else zeros


def unpack_layer(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedWeight:
    shape_of(tensors, spec)
    zeros = zeros_of(tensors, spec)
    return QuantizedWeight(
        codes=_unpack_outputs(tensors["qweight"]),
        scales=tensors["scales"].t().contiguous(),
        zeros=zeros,
        scheme=QuantScheme(4, spec.scheme.group_size, symmetric=zeros is None),
    )


LAYOUT = Layout(
    SUFFIXES,
    shape_of,
    unpack_layer,
    zeros_of=zeros_of,
    axes={
        "qweight": ("in", "out words"),
        "qzeros": ("groups", "out words"),
        "scales": ("groups", "out"),
    },
)


def quantization_config(
    quantized: Mapping[str, QuantScheme], dense: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json.

    Full names in `modules_to_not_convert`: transformers matches from the start, vLLM anywhere, and
    only full names mean the same to both.
    """
    scheme = one_scheme("awq", quantized)
    not_converted = list(dense)
    if "lm_head" not in quantized and "lm_head" not in not_converted:
        not_converted.append("lm_head")
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "zero_point": True,
        "version": "gemm",
        "modules_to_not_convert": not_converted,
    }


def _pack_outputs(codes: Tensor) -> Tensor:
    """[out, n] uint8 -> [n, out / 8] int32, interleaved."""
    return pack(reorder(codes.t(), AWQ_ORDER), 4)


def _unpack_outputs(words: Tensor) -> Tensor:
    """[n, out / 8] int32 -> [out, n] uint8."""
    codes = unpack(words, 4, words.shape[1] * CODES_PER_WORD)
    return reorder(codes, AWQ_INVERSE).t().contiguous()


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
    """What a file's quantization_config says; AutoAWQ's own spellings are read too."""
    version = str(config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedModel(
            f"{where} holds AWQ weights of version {version!r}, which is not read", "read: gemm"
        )
    scheme = scheme_from_config(
        where,
        bits=config.get("bits", config.get("w_bit")),
        group_size=config.get("group_size", config.get("q_group_size", -1)),
        symmetric=False,
        widths=(4,),
    )
    return {module: Packed(LAYOUT, LayerSpec(module, scheme)) for module in modules}
