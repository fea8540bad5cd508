"""compressed-tensors `pack-quantized`, 2 to 8 bits: what `qtool quantize` writes by default.

    weight_packed      int32 [out, ceil(in * bits / 32)]      rows of codes, a dense bitstream
    weight_scale       model dtype [out, groups]              [out, 1] where a row is one group
    weight_shape       int64 [2]                              out, in
    weight_zero_point  int32 [ceil(out * bits / 32), groups]  asymmetric only, packed down outputs

    W[o, k] = (q[o, k] - z[o, k // group]) * weight_scale[o, k // group]

Codes and zeros are stored unsigned, offset by 2**(bits-1), which is just how `QuantizedWeight`
holds them. The one format that transformers loads with a small pure-Python package, MoE and mixed
widths included; asymmetric files need compressed-tensors before 0.18 there, or `dequantize=True`.

Before its 0.18.0 the library packed 3, 5, 6 and 7 bits as floor(32 / bits) codes a word. The two
layouts have different widths for all but tiny rows, so a file is read by what its shapes say; where
they do not tell, the file's version decides, and an old one is refused.

Source: vllm-project/compressed-tensors compressors/pack_quantized, quantization/quant_config.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from qtool.convert.layer import (
    LayerSpec,
    check_group_index,
    expect_floating,
    expect_shape,
    is_act_order,
    malformed,
    require,
    scheme_from_config,
    whole_groups,
)
from qtool.convert.packing import WORD_BITS, num_words, pack, unpack, unpack_padded
from qtool.errors import FormatError, QtoolError, UnsupportedModel
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


def quantization_config(
    quantized: Mapping[str, QuantScheme], dense: Sequence[str]
) -> dict[str, Any]:
    """The entry of config.json: one group of modules for each scheme.

    With one scheme its group takes every Linear and `ignore` names, in full, those that stay dense.
    With several, each group names its modules by regular expressions that no other group matches.
    """
    by_scheme: dict[QuantScheme, list[str]] = {}
    for module, scheme in quantized.items():
        by_scheme.setdefault(scheme, []).append(module)
    ignore = list(dense)
    if "lm_head" not in quantized and "lm_head" not in ignore:
        # A tied head has no tensor of its own, and yet is a Linear to the loader.
        ignore.append("lm_head")
    groups = {}
    for number, (scheme, modules) in enumerate(by_scheme.items()):
        targets = ["Linear"]
        if len(by_scheme) > 1:
            others = [name for name in (*quantized, *ignore) if name not in set(modules)]
            targets = target_patterns(modules, others)
        groups[f"group_{number}"] = {
            "targets": targets,
            "input_activations": None,
            "output_activations": None,
            "weights": _weights_entry(scheme),
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "version": metadata.version("compressed-tensors"),
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore,
        "config_groups": groups,
    }


def _weights_entry(scheme: QuantScheme) -> dict[str, Any]:
    return {
        "num_bits": scheme.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }


def target_patterns(modules: Sequence[str], others: Iterable[str]) -> list[str]:
    """`re:` targets that match `modules` and none of `others`.

    Modules that differ only in block number share a pattern: any number where every block agrees,
    a list of numbers where not.

    >>> target_patterns(["layers.0.up", "layers.1.up", "layers.1.down"], ["layers.0.down"])
    ['re:layers\\\\.\\\\d+\\\\.up$', 're:layers\\\\.(1)\\\\.down$']
    """
    other_templates = {_template(name)[0] for name in others}
    numbers: dict[str, list[str]] = {}
    for module in modules:
        template, number = _template(module)
        numbers.setdefault(template, []).append(number)
    patterns = []
    for template, blocks in numbers.items():
        block = f"({'|'.join(blocks)})" if template in other_templates else r"\d+"
        patterns.append("re:" + re.escape(template).replace("\0", block) + "$")
    return patterns


def _template(module: str) -> tuple[str, str]:
    """A name with its first number taken out: "layers.3.up" -> ("layers.\\0.up", "3")."""
    parts = module.split(".")
    for i, part in enumerate(parts):
        if part.isdigit():
            return ".".join([*parts[:i], "\0", *parts[i + 1 :]]), part
    return module, ""


def read_specs(
    config: Mapping[str, Any], modules: Sequence[str], where: str
) -> dict[str, LayerSpec]:
    """What a file's quantization_config says of each packed module.

    where  the file that holds the config, for errors
    """
    if config.get("transform_config"):
        raise UnsupportedModel(
            f"{where} rotates activations at run time (transform_config), which is not supported"
        )
    sparsity = config.get("sparsity_config")
    if isinstance(sparsity, Mapping) and sparsity.get("format", "dense") != "dense":
        raise UnsupportedModel(f"{where} is sparse ({sparsity['format']}), which is not supported")
    groups = config.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise FormatError(f"{where}: quantization_config has no config_groups")
    version = str(config.get("version") or "")
    specs = {}
    for module in modules:
        group = next((g for g in groups.values() if _targets(g, module, where)), None)
        if group is None:
            raise FormatError(f"{where}: no config group targets {module}, which is packed")
        specs[module] = LayerSpec(module, _scheme(group, config, where), layout=version)
    return specs


def _targets(group: Any, module: str, where: str) -> bool:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise FormatError(f"{where}: a config group has no list of targets")
    return any(_matches(target, module, where) for target in targets)


def _matches(target: str, module: str, where: str) -> bool:
    if not target.startswith("re:"):
        return target in ("Linear", module)
    try:
        return re.match(target.removeprefix("re:"), module) is not None
    except re.error as error:
        raise FormatError(f"{where}: target {target!r} is no regular expression: {error}") from None


def _scheme(group: Mapping[str, Any], config: Mapping[str, Any], where: str) -> QuantScheme:
    layout = group.get("format") or config.get("format")
    weights = group.get("weights")
    if layout != "pack-quantized" or not isinstance(weights, Mapping):
        raise UnsupportedModel(
            f"{where} holds compressed-tensors of format {layout!r}, which is not read",
            "read: pack-quantized, 2 to 8 bit integer weights",
        )
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy not in ("group", "channel", "tensor") or weights.get("type", "int") != "int":
        raise UnsupportedModel(
            f"{where}: {weights.get('type')} weights by {strategy!r} are not read",
            "read: integers by group, channel or tensor",
        )
    return scheme_from_config(
        where,
        bits=weights.get("num_bits"),
        group_size=group_size if strategy == "group" else None,
        symmetric=weights.get("symmetric", True),
    )
