"""GPTQ files: the layout of AutoGPTQ and GPTQModel, `quant_method: gptq`.

    qweight  int32 [in * bits / 32, out]      codes packed down the inputs
    qzeros   int32 [groups, out * bits / 32]  zero points packed along the outputs
    scales   fp16  [groups, out]
    g_idx    int32 [in]                       the group of each input

    W[o, k] = scales[g_idx[k], o] * (q[o, k] - z[g_idx[k], o])

Both pack dense little-endian bitstreams (packing.py), so qweight is the transpose of what
compressed-tensors calls weight_packed, word for word. Version 1 (`checkpoint_format: gptq`) stores
z - 1 in every field, modulo 2**bits: a symmetric four-bit file has qzeros 0x77777777. Version 2
stores z. Read: both, 2, 3, 4 and 8 bits, symmetric or not. Written: version 1, symmetric, which is
what every reader of the format agrees on; with asymmetric zeros of 0 the stored field wraps and
readers differ.

Act-order files cut groups in the order in which columns were solved, so `g_idx` is not k // group
size; the reader dequantizes those through g_idx (layer.py). What is written here has static groups
and never needs it.

Sources: IST-DASLab/gptq quant.py, ModelCloud/GPTQModel nn_modules/qlinear, vLLM auto_gptq.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qtool import __version__
from qtool.convert.layer import (
    LayerSpec,
    Layout,
    Packed,
    check_group_index,
    expect_floating,
    expect_shape,
    half_scales,
    is_act_order,
    malformed,
    one_scheme,
    pattern_matches,
    refuse_groups,
    require,
    scheme_from_config,
    whole_groups,
)
from qtool.convert.packing import WORD_BITS, pack, unpack
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight

SUFFIXES = ("qweight", "qzeros", "scales", "g_idx")
BITS = (2, 3, 4, 8)
GROUP_SIZES = (32, 64, 128)  # what the kernels of vLLM, SGLang and GPTQModel share
V1, V2 = "gptq", "gptq_v2"


def refuses(scheme: QuantScheme, out_features: int, in_features: int) -> str | None:
    if scheme.bits not in BITS:
        return f"GPTQ files hold 2, 3, 4 or 8 bits, not {scheme.bits}"
    if not scheme.symmetric:
        return "GPTQ v1 stores zero points less one, so readers differ on asymmetric weights"
    if in_features % WORD_BITS or out_features % WORD_BITS:
        return f"GPTQ packs by 32 along both sides, which {out_features} x {in_features} is not"
    return refuse_groups("GPTQ", scheme, in_features, GROUP_SIZES)


def pack_layer(weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, Tensor]:
    """Version 1 tensors of one linear; `dtype` is not used, the layout's scales are fp16."""
    bits, (_, in_features) = weight.scheme.bits, weight.shape
    group_width = weight.scheme.group_width(in_features)
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full_like(weight.scales, weight.scheme.midpoint, dtype=torch.uint8)
    stored = (zeros.to(torch.int16) - 1) % weight.scheme.num_codes
    return {
        "qweight": pack(weight.codes, bits).t().contiguous(),
        "qzeros": pack(stored.to(torch.uint8).t().contiguous(), bits),
        "scales": half_scales(weight.scales).t().contiguous(),
        "g_idx": torch.arange(in_features, dtype=torch.int32) // group_width,
    }


def shape_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> tuple[int, int]:
    """[out, in], after checking every tensor's shape against the spec (meta tensors will do)."""
    bits = spec.scheme.bits
    qweight = require(tensors, "qweight", spec, ndim=2, dtype=torch.int32)
    rows, out_features = qweight.shape
    if rows * WORD_BITS % bits:
        raise malformed(spec, "qweight", f"{rows} rows of words hold no whole {bits}-bit codes")
    in_features = rows * WORD_BITS // bits
    groups = whole_groups(spec, "qweight", in_features)
    scales = require(tensors, "scales", spec, ndim=2)
    expect_floating(scales, spec, "scales")
    expect_shape(scales, (groups, out_features), spec, "scales")
    if "qzeros" in tensors:
        qzeros = require(tensors, "qzeros", spec, ndim=2, dtype=torch.int32)
        if out_features * bits % WORD_BITS:
            raise malformed(spec, "qzeros", f"{out_features} outputs do not fill 32-bit words")
        expect_shape(qzeros, (groups, out_features * bits // WORD_BITS), spec, "qzeros")
    elif not spec.scheme.symmetric:
        raise malformed(spec, "qzeros", "is missing, and the config says the file is asymmetric")
    check_group_index(tensors, "g_idx", in_features, spec)
    return out_features, in_features


def zeros_of(tensors: Mapping[str, Tensor], spec: LayerSpec) -> Tensor | None:
    """Zero points [out, groups] uint8, or None where all are the midpoint (a symmetric weight)."""
    if "qzeros" not in tensors:
        return None
    out_features = tensors["scales"].shape[1]
    zeros = unpack(tensors["qzeros"], spec.scheme.bits, out_features)
    if spec.layout != V2:
        zeros = (zeros + 1) & (spec.scheme.num_codes - 1)
    if bool((zeros == spec.scheme.midpoint).all()):
        return None
    return zeros.t().contiguous()


def unpack_layer(tensors: Mapping[str, Tensor], spec: LayerSpec) -> QuantizedWeight:
    _, in_features = shape_of(tensors, spec)
    if "g_idx" in tensors and is_act_order(tensors["g_idx"], spec.scheme):
        raise malformed(spec, "g_idx", "puts inputs in groups out of order (act-order)")
    zeros = zeros_of(tensors, spec)
    return QuantizedWeight(
        codes=unpack(tensors["qweight"].t().contiguous(), spec.scheme.bits, in_features),
        scales=tensors["scales"].t().contiguous(),
        zeros=zeros,
        scheme=QuantScheme(spec.scheme.bits, spec.scheme.group_size, symmetric=zeros is None),
    )


LAYOUT = Layout(
    SUFFIXES,
    shape_of,
    unpack_layer,
    zeros_of=zeros_of,
    group_index="g_idx",
    axes={
        "qweight": ("in words", "out"),
        "qzeros": ("groups", "out words"),
        "scales": ("groups", "out"),
    },
)


def quantization_config(
    quantized: Mapping[str, QuantScheme], dense: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json, also written as quantize_config.json by GPTQModel.

    `modules_in_block_to_quantize` appears only where linears inside the blocks stay dense; loaders
    then look for names that end so. The key `dynamic` would say more and transformers breaks on it.
    """
    scheme = one_scheme("gptq", quantized)
    config: dict[str, Any] = {
        "quant_method": "gptq",
        "checkpoint_format": V1,
        "format": V1,
        "bits": scheme.bits,
        "group_size": -1 if scheme.group_size is None else scheme.group_size,
        "desc_act": False,
        "sym": scheme.symmetric,
        "lm_head": False,
        "pack_dtype": "int32",
        "true_sequential": True,
        "static_groups": False,
        "damp_percent": 0.01,
        "meta": {"quantizer": [f"qtool:{__version__}"]},
    }
    dense_in_blocks = [name for name in dense if _name_in_block(name) is not None]
    if dense_in_blocks:
        config["modules_in_block_to_quantize"] = [_shortest_names(quantized, dense_in_blocks)]
    return config


def _shortest_names(quantized: Mapping[str, QuantScheme], dense: Sequence[str]) -> list[str]:
    """Names within a block ("mlp.up_proj") where every block agrees, full names where not."""
    names: dict[str, None] = {}
    for module in quantized:
        short = _name_in_block(module)
        ambiguous = short is None or any(name.endswith(short) for name in dense)
        names[module if ambiguous else str(short)] = None
    return list(names)


def _name_in_block(module: str) -> str | None:
    """What follows the block's number: "self_attn.q_proj" of "model.layers.3.self_attn.q_proj"."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit() and i + 1 < len(parts):
            return ".".join(parts[i + 1 :])
    return None


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
    """What a file's quantization_config says of each packed module, `dynamic` included."""
    layout = config.get("checkpoint_format") or config.get("format") or V1
    if layout not in (V1, V2):
        raise UnsupportedModel(
            f"{where} holds GPTQ weights in checkpoint format {layout!r}, which is not read",
            f"read: {V1} and {V2}",
        )
    if (config.get("pack_dtype") or "int32") not in ("int32", "torch.int32"):
        raise UnsupportedModel(f"{where} packs into {config['pack_dtype']}; only int32 is read")
    packed = {}
    for module in modules:
        scheme = _scheme(_overridden(config, module, where), where)
        packed[module] = Packed(LAYOUT, LayerSpec(module, scheme, layout))
    return packed


def _scheme(config: Mapping[str, Any], where: str) -> QuantScheme:
    return scheme_from_config(
        where,
        bits=config.get("bits"),
        group_size=config.get("group_size", -1),
        symmetric=config.get("sym", True),
        widths=BITS,
    )


def _overridden(config: Mapping[str, Any], module: str, where: str) -> Mapping[str, Any]:
    """GPTQModel's `dynamic`: the first "+:regex" (or bare regex) that matches overrides fields."""
    dynamic = config.get("dynamic") or {}
    if not isinstance(dynamic, Mapping):
        raise FormatError(f"{where}: dynamic is {type(dynamic).__name__}, not an object")
    for pattern, fields in dynamic.items():
        if pattern.startswith("-:") or not isinstance(fields, Mapping):
            continue
        if pattern_matches(pattern.removeprefix("+:"), module, f"{where}: dynamic"):
            return {**config, **fields}
    return config
