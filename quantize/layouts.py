"""How a recipe's weights lie in the artifact: the packers of the kinds beyond plain integers.

`convert.formats` packs weight-only integers, which convert between each other. What is here is
written by `quantize` alone:

    float8     compressed-tensors float-quantized, a scale a row or a block, activations to 8-bit
               floats by token at run time
    w8a8       compressed-tensors int-quantized, activations to int8 by token at run time
    nvfp4, mxfp4   compressed-tensors, weights only
    nf4        bitsandbytes, without double quantization
    codebook   codes with a table a row, for `qtool` itself

Each is a `Format` as those are, so that the pipeline sees one kind of thing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from qtool.convert import bitsandbytes, codebook, float4, float8, int_quantized
from qtool.convert.formats import FORMATS, Format
from qtool.convert.layer import FloatSpec, LayerSpec, Layout
from qtool.errors import UsageError
from qtool.quantize.rounding import NF4, nvfp4_factor
from qtool.recipe import Recipe
from qtool.scheme import FloatScheme, QuantScheme, codebook_scheme
from qtool.weights import CodebookWeight, Float8Weight, QuantizedWeight, Weight

Scheme = QuantScheme | FloatScheme


def layout_for(recipe: Recipe, format: str) -> Format:
    """The layout of a recipe's weights; UsageError where the format cannot hold them."""
    if recipe.weights == "int" and recipe.activations == "none":
        return FORMATS[format]
    layout = W8A8 if recipe.weights == "int" else FLOAT_LAYOUTS[recipe.weights]
    if format not in ("compressed-tensors", layout.name):
        raise UsageError(
            f"recipe {recipe.name} cannot be written as {format}",
            f"leave out --format: it is written as {layout.name}",
        )
    return layout


def spec_of(module: str, scheme: Scheme) -> LayerSpec | FloatSpec:
    return (
        LayerSpec(module, scheme) if isinstance(scheme, QuantScheme) else FloatSpec(module, scheme)
    )


def quantizes_activations(layout: Format) -> bool:
    """Whether loaders round activations too, so that their logits are not the weights' alone."""
    return layout in (W8A8, FLOAT_LAYOUTS["fp8"], FLOAT_LAYOUTS["fp8-block"])


def bits_per_weight(scheme: Scheme, out_features: int, in_features: int) -> float:
    """Stored bits a weight with its share of scales."""
    if isinstance(scheme, QuantScheme):
        return scheme.bits_per_weight(in_features)
    rows, columns = scheme.block
    each = (rows or out_features) * (columns or in_features)
    bits, scale_bits = _BITS[scheme.name]
    return bits + scale_bits / each


_BITS: dict[str, tuple[int, int]] = {
    "fp8": (8, 16),
    "nvfp4": (4, 8),
    "mxfp4": (4, 8),
    "nf4": (4, 32),
    **{codebook_scheme(bits).name: (bits, 16 * 2**bits) for bits in codebook.BITS},
}


def _pack_float8(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(weight, Float8Weight)
    return {"weight": weight.values, "weight_scale": weight.scales.to(dtype)}


def _pack_w8a8(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(weight, QuantizedWeight)
    signed = (weight.codes.to(torch.int16) - weight.scheme.midpoint).to(torch.int8)
    return {"weight": signed, "weight_scale": weight.scales.to(dtype)}


def _packed_nibbles(codes: Tensor) -> Tensor:
    """Inputs 2i in the low four bits, 2i + 1 in the high."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def _pack_nvfp4(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(weight, CodebookWeight)
    scales = weight.scales.view(weight.shape[0], -1)
    overall = nvfp4_factor(scales.max()).reshape(1)
    return {
        "weight_packed": _packed_nibbles(weight.codes),
        "weight_scale": (scales * overall).to(torch.float8_e4m3fn),
        "weight_global_scale": overall,
    }


def _pack_mxfp4(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(weight, CodebookWeight)
    exponents = torch.log2(weight.scales).round().to(torch.int32) + 127
    return {
        "weight_packed": _packed_nibbles(weight.codes),
        "weight_scale": exponents.clamp(0, 254).to(torch.uint8).view(weight.shape[0], -1),
    }


def _pack_nf4(weight: Weight, dtype: torch.dtype) -> dict[str, Tensor]:
    assert isinstance(weight, CodebookWeight)
    codes = weight.codes.flatten()
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    state = {
        "quant_type": "nf4",
        "blocksize": weight.block_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(weight.shape),
    }
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {
        "weight": ((codes[0::2] << 4) | codes[1::2]).unsqueeze(1),
        "weight.absmax": weight.scales,
        "weight.quant_map": torch.tensor(NF4),
        bitsandbytes.NF4_STATE: text,
    }


def _weights_only(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {"weights": dict(entry), "input_activations": None, "output_activations": None}


def _by_token(entry: Mapping[str, Any], **activations: Any) -> dict[str, Any]:
    given = {"num_bits": 8, "symmetric": True, "dynamic": True, **activations}
    return {**_weights_only(entry), "input_activations": given}


_COMMON = {"symmetric": True, "dynamic": False, "observer": "minmax"}
_GROUPS: dict[str, tuple[str, dict[str, Any]]] = {
    "fp8": (
        "float-quantized",
        _by_token(
            {**_COMMON, "num_bits": 8, "type": "float", "strategy": "channel"},
            type="float",
            strategy="token",
        ),
    ),
    "fp8-block": (
        "float-quantized",
        _by_token(
            {
                **_COMMON,
                "num_bits": 8,
                "type": "float",
                "strategy": "block",
                "block_structure": [128, 128],
            },
            type="float",
            strategy="group",
            group_size=128,
        ),
    ),
    "w8a8": (
        "int-quantized",
        _by_token(
            {**_COMMON, "num_bits": 8, "type": "int", "strategy": "channel"},
            type="int",
            strategy="token",
        ),
    ),
    "nvfp4": (
        "nvfp4-pack-quantized",
        _weights_only(
            {
                **_COMMON,
                "num_bits": 4,
                "type": "float",
                "strategy": "tensor_group",
                "group_size": 16,
                "scale_dtype": "torch.float8_e4m3fn",
            }
        ),
    ),
    "mxfp4": (
        "mxfp4-pack-quantized",
        _weights_only(
            {
                **_COMMON,
                "num_bits": 4,
                "type": "float",
                "strategy": "group",
                "group_size": 32,
                "scale_dtype": "torch.uint8",
            }
        ),
    ),
}


def compressed_format(layout: Format) -> tuple[str, dict[str, Any]]:
    """compressed-tensors' name of a layout's format, and its entry for a group of modules."""
    return next(_GROUPS[kind] for kind, known in _COMPRESSED.items() if known is layout)


def _config(kind: str) -> Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]]:
    def config(quantized: Mapping[str, Any], dense: Sequence[str]) -> dict[str, Any]:
        name, group = _GROUPS[kind]
        ignore = list(dense) if "lm_head" in dense else [*dense, "lm_head"]
        return {
            "quant_method": "compressed-tensors",
            "format": name,
            "quantization_status": "compressed",
            "version": metadata.version("compressed-tensors"),
            "global_compression_ratio": None,
            "kv_cache_scheme": None,
            "ignore": ignore,
            "config_groups": {"group_0": {"targets": ["Linear"], **group}},
        }

    return config


def _nf4_config(quantized: Mapping[str, Any], dense: Sequence[str]) -> dict[str, Any]:
    ignore = list(dense) if "lm_head" in dense else [*dense, "lm_head"]
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": False,
        "bnb_4bit_compute_dtype": "bfloat16",
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": ignore,
    }


def _takes_multiples(of: int) -> Callable[[Any, int, int], str | None]:
    def refuses(scheme: Any, out_features: int, in_features: int) -> str | None:
        if in_features % of == 0:
            return None
        return f"{in_features} inputs are not a multiple of {of}"

    return refuses


def _format(kind: str, layout: Layout, pack: Any, multiple: int = 1) -> Format:
    return Format(
        name="compressed-tensors",
        layout=layout,
        single_scheme=True,
        refuses=_takes_multiples(multiple),
        pack=pack,
        quantization_config=_config(kind),
    )


W8A8 = _format("w8a8", int_quantized.LAYOUT, _pack_w8a8)
FLOAT_LAYOUTS: dict[str, Format] = {
    "fp8": _format("fp8", float8.LAYOUT, _pack_float8),
    "fp8-block": _format("fp8-block", float8.LAYOUT, _pack_float8),
    "nvfp4": _format("nvfp4", float4.LAYOUT, _pack_nvfp4, 16),
    "mxfp4": _format("mxfp4", float4.LAYOUT, _pack_mxfp4, 32),
    "nf4": Format(
        name="bitsandbytes",
        layout=bitsandbytes.FOUR_BIT,
        single_scheme=True,
        refuses=_takes_multiples(1),
        pack=_pack_nf4,
        quantization_config=_nf4_config,
    ),
    "codebook": Format(
        name="codebook",
        layout=codebook.LAYOUT,
        single_scheme=False,
        refuses=_takes_multiples(1),
        pack=codebook.pack_layer,  # type: ignore[arg-type]
        quantization_config=codebook.quantization_config,  # type: ignore[arg-type]
    ),
}
_COMPRESSED = {"w8a8": W8A8, **{kind: FLOAT_LAYOUTS[kind] for kind in _GROUPS if kind != "w8a8"}}
