"""Marlin's tile layout (IST-DASLab/marlin, vLLM's gptq_marlin_repack), kept on disk.

    B  int32 [in / 16, out * bits / 2]   codes as the tensor cores take them
    s  fp16  [groups, out]               columns permuted
    z  int32 [groups, out * bits / 32]   asymmetric only; columns permuted, interleaved, packed

One thread of an m16n8k16 tensor-core step holds, of a 16 x 16 tile, inputs 2c, 2c+1, 2c+8, 2c+9 of
outputs r and r+8, where r = thread // 4 and c = thread % 4. Marlin gives a thread one word for
each of the four tiles of a 16 x 64 strip, side by side, so that it loads its whole share with one
16-byte load. That is all the famous 1024-entry permutation says, and it is a transposition of
axes:

    input  k = 16 kt + 8 h + 2 c + l         kt strips, h 2, c 4, l 2
    output n = 64 nb + 16 j + 8 b + r        nb strips, j 4, b 2, r 8
    word       B[kt, nb, r, c, j]
    4 bits     field 4 l + 2 b + h of the word; fields l = 0 and l = 1 are 16 bits apart, so one
               mask gives a half2 of neighbouring inputs
    8 bits     two words (b), byte 2 l + h

Worked, 4 bits: input 9 (h 1, c 0, l 1) of output 8 (b 1, r 0) lies in word 0, field 4 + 2 + 1 = 7.

Scales follow the outputs a thread accumulates: within 64 columns n = 8 j + i is stored at 8 i + j;
where the whole row is one group they are needed only at the end, in the order of the accumulators:
within 32 columns n = 8 a + 2 i + l is stored at 8 i + 2 a + l. Zero points take the first order and
then, within eight, AWQ's interleave (8 bits: within four, 0 2 1 3).

No other loader maps such a file today (vLLM and SGLang repack GPTQ at load), so it is written under
a key of its own, `quant_method: "qtool-marlin"`, with a version. Legal shapes are vLLM's: inputs a
multiple of 128, outputs of 64; groups of 32, 64, 128 or the whole row.
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
    malformed,
    refuse_groups,
    require,
    whole_groups,
)
from qtool.convert.own_config import OwnConfig
from qtool.convert.packing import AWQ_INVERSE, AWQ_ORDER, WORD_BITS, pack, reorder, unpack
from qtool.errors import FormatError, UsageError
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

QUANT_METHOD = "qtool-marlin"
CONFIG = OwnConfig(
    QUANT_METHOD,
    version=1,
    name="Marlin",
    hint="convert the file again from the artifact it was made of",
)
SUFFIXES = ("B", "s", "z")
GROUP_SIZES = (32, 64, 128)
TILE = 16
IN_MULTIPLE, OUT_MULTIPLE = 128, 64
ZERO_ORDER = {4: AWQ_ORDER, 8: (0, 2, 1, 3)}
ZERO_INVERSE = {4: AWQ_INVERSE, 8: (0, 2, 1, 3)}


def refuses(scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
    if scheme.bits not in (4, 8):
        return f"Marlin kernels take 4 or 8 bits, not {scheme.bits}"
    if scheme.bits == 8 and not scheme.symmetric:
        return "Marlin kernels take zero points with 4 bits only"
    if in_features % IN_MULTIPLE or out_features % OUT_MULTIPLE:
        return (
            f"Marlin tiles need inputs a multiple of {IN_MULTIPLE} and outputs of {OUT_MULTIPLE}, "
            f"and this is {in_features} -> {out_features}"
        )
    return refuse_groups("Marlin", scheme, in_features, GROUP_SIZES)


def pack_layer(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Marlin tensors of one linear; `dtype` is not used, the layout's scales are fp16."""
    bits = weight.scheme.bits
    tensors = {
        "B": pack(tile(weight.codes, bits), bits),
        "s": permute_scales(half_scales(weight.scales).t()),
    }
    if weight.zeros is not None:
        permuted = _by_eights(weight.zeros.t())
        tensors["z"] = pack(reorder(permuted, ZERO_ORDER[bits]), bits)
    return tensors


def shape_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec (meta tensors will do)."""
    bits = spec.scheme.bits
    words = require(tensors, "B", spec, ndim=2, dtype=torch.int32)
    in_features, out_features = words.shape[0] * TILE, words.shape[1] * 2 // bits
    if out_features == 0 or out_features * bits != words.shape[1] * 2:
        raise malformed(spec, "B", f"has shape {list(words.shape)}")
    reason = refuses(spec.scheme, out_features, in_features)
    if reason is not None:
        raise malformed(spec, "B", f"of {in_features} -> {out_features} is not Marlin's: {reason}")
    groups = whole_groups(spec, "B", in_features)
    scales = require(tensors, "s", spec, ndim=2)
    expect_floating(scales, spec, "s")
    expect_shape(scales, (groups, out_features), spec, "s")
    if not spec.scheme.symmetric:
        zeros = require(tensors, "z", spec, ndim=2, dtype=torch.int32)
        expect_shape(zeros, (groups, out_features * bits // WORD_BITS), spec, "z")
    elif "z" in tensors:
        raise malformed(spec, "z", "is there, and a symmetric layer has no zero points")
    return out_features, in_features


def unpack_layer(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedWeight:
    out_features, in_features = shape_of(tensors, spec)
    bits = spec.scheme.bits
    zeros = None
    if not spec.scheme.symmetric:
        interleaved = unpack(tensors["z"], bits, out_features)
        zeros = _by_eights(reorder(interleaved, ZERO_INVERSE[bits])).t().contiguous()
    codes = unpack(tensors["B"], bits, out_features * TILE)
    return QuantizedWeight(
        codes=untile(codes, bits, out_features, in_features),
        scales=unpermute_scales(tensors["s"]).t().contiguous(),
        zeros=zeros,
        scheme=spec.scheme,
    )


LAYOUT = Layout(SUFFIXES, shape_of, unpack_layer)


def tile(codes: Tensor, bits: int) -> Tensor:
    """[out, in] -> [in / 16, 16 * out], the fields of B in order."""
    out_features, in_features = codes.shape
    # axes            nb  j  b  r  kt  h  c  l
    split = codes.view(-1, 4, 2, 8, in_features // TILE, 2, 4, 2)
    nb, j, b, r, kt, h, c, l = range(8)  # noqa: E741  (the names of the docstring)
    order = (kt, nb, r, c, j, l, b, h) if bits == 4 else (kt, nb, r, c, j, b, l, h)
    return split.permute(order).reshape(in_features // TILE, TILE * out_features)


def untile(fields: Tensor, bits: int, out_features: int, in_features: int) -> Tensor:
    """The inverse of `tile`: [in / 16, 16 * out] -> [out, in]."""
    strips, columns = in_features // TILE, out_features // 64
    if bits == 4:
        # axes          kt      nb       r  c  j  l  b  h
        split = fields.view(strips, columns, 8, 4, 4, 2, 2, 2)
        kt, nb, r, c, j, l, b, h = range(8)  # noqa: E741
    else:
        # axes          kt      nb       r  c  j  b  l  h
        split = fields.view(strips, columns, 8, 4, 4, 2, 2, 2)
        kt, nb, r, c, j, b, l, h = range(8)  # noqa: E741
    return split.permute(nb, j, b, r, kt, h, c, l).reshape(out_features, in_features)


def permute_scales(scales: Tensor) -> Tensor:
    """Natural columns to Marlin's.  scales [groups, out]."""
    if scales.shape[0] > 1:
        return _by_eights(scales)
    # a i l -> i a l within 32 columns
    return scales.reshape(-1, 4, 4, 2).transpose(1, 2).reshape(scales.shape)


def unpermute_scales(scales: Tensor) -> Tensor:
    """Marlin's columns to natural ones; both orders undo themselves."""
    return permute_scales(scales)


def _by_eights(columns: Tensor) -> Tensor:
    """Transpose every run of 64 columns as an 8 x 8 square.  columns [groups, out]."""
    return columns.reshape(columns.shape[0], -1, 8, 8).transpose(2, 3).reshape(columns.shape)


def quantization_config(
    quantized: Mapping[str, QuantScheme], dense: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json: the scheme of every packed layer by name."""
    return CONFIG.entry({module: str(scheme) for module, scheme in quantized.items()}, dense)


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
    """What a file's quantization_config says of each packed module."""
    layers = CONFIG.layers(config, modules, where)
    packed = {}
    for module in modules:
        if not isinstance(layers.get(module), str):
            raise FormatError(f"{where}: {module} is packed, and its scheme is not in the config")
        try:
            scheme = QuantScheme.parse(layers[module])
        except UsageError as error:
            raise FormatError(f"{where}: {module}: {error.message}") from None
        packed[module] = Packed(LAYOUT, LayerSpec(module, scheme))
    return packed
