"""compressed-tensors: its entry in config.json, written and read.

A file of this family may hold linears in several of the library's formats, each group of modules
by a scheme of its own, and leave others dense:

    pack-quantized         integers of 2 to 8 bits in 32-bit words    pack_quantized.py
    int-quantized          integers in bytes, W8A8                    int_quantized.py
    float-quantized        8-bit floats                               float8.py
    naive-quantized        either of these, by the group's type
    mxfp8-quantized        8-bit floats, power-of-two scales          float8.py
    nvfp4-pack-quantized   4-bit floats                               float4.py
    mxfp4-pack-quantized   4-bit floats, power-of-two scales          float4.py

Written is pack-quantized: the one format that transformers loads with a small pure-Python package,
MoE and mixed widths included; asymmetric files need compressed-tensors before 0.18 there, or
`dequantize=True`.

Source: vllm-project/compressed-tensors quantization/quant_config.py and quant_args.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any

from qtool.convert import float4, float8, int_quantized, pack_quantized
from qtool.convert.layer import (
    FloatSpec,
    LayerSpec,
    Packed,
    pattern_matches,
    scheme_from_config,
)
from qtool.errors import FormatError, UnsupportedModel
from qtool.scheme import FloatScheme, QuantScheme

# A packed linear has one of these; the first is pack-quantized's and the 4-bit floats'.
MARKERS = ("weight_packed", "weight_scale")
# Scales of the KV cache (older files have them as the output scales of k_proj and v_proj) and of
# static activations: for runtimes that quantize those too.
ACTIVATION_SUFFIXES = (
    *("k_scale", "v_scale", "q_scale", "k_zero_point", "v_zero_point"),
    *("output_scale", "output_zero_point"),
    *("input_scale", "input_zero_point", "input_global_scale"),
)


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


def read(config: Mapping[str, Any], modules: Sequence[str], where: str) -> dict[str, Packed]:
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
    packed = {}
    for module in modules:
        group = next((g for g in groups.values() if _targets(g, module, where)), None)
        if group is None:
            raise FormatError(f"{where}: no config group targets {module}, which is packed")
        packed[module] = _packed(module, group, config, where)
    return packed


def _targets(group: Any, module: str, where: str) -> bool:
    targets = group.get("targets") if isinstance(group, Mapping) else None
    if not isinstance(targets, list) or not all(isinstance(target, str) for target in targets):
        raise FormatError(f"{where}: a config group has no list of targets")
    return any(
        pattern_matches(target.removeprefix("re:"), module, where)
        if target.startswith("re:")
        else target in ("Linear", module)
        for target in targets
    )


def _packed(module: str, group: Mapping[str, Any], config: Mapping[str, Any], where: str) -> Packed:
    name = group.get("format") or config.get("format")
    weights = group.get("weights")
    reader = READERS.get(name) if isinstance(name, str) else None
    if reader is None or not isinstance(weights, Mapping):
        raise UnsupportedModel(
            f"{where} holds compressed-tensors of format {name!r}, which is not read",
            f"read: {', '.join(READERS)}",
        )
    return reader(module, weights, config, where)


def _pack_quantized(
    module: str, weights: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Packed:
    scheme = _integers(weights, where)
    version = str(config.get("version") or "")
    return Packed(pack_quantized.LAYOUT, LayerSpec(module, scheme, layout=version))


def _naive_quantized(
    module: str, weights: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Packed:
    if weights.get("type", "int") == "int":
        return Packed(int_quantized.LAYOUT, LayerSpec(module, _integers(weights, where)))
    return _float8(module, weights, where, "fp8")


def _mxfp8_quantized(
    module: str, weights: Mapping[str, Any], config: Mapping[str, Any], where: str
) -> Packed:
    return _float8(module, weights, where, "mxfp8")


def _float4_reader(name: str) -> Callable[..., Packed]:
    def read(
        module: str, weights: Mapping[str, Any], config: Mapping[str, Any], where: str
    ) -> Packed:
        group_size = float4.GROUP_SIZES[name]
        kind = (weights.get("num_bits"), weights.get("type"), weights.get("group_size"))
        if kind != (4, "float", group_size):
            raise FormatError(
                f"{where}: {name} weights are 4-bit floats in groups of {group_size}; "
                f"here they are {kind[1]!r} of {kind[0]!r} bits in groups of {kind[2]!r}"
            )
        return Packed(float4.LAYOUT, FloatSpec(module, FloatScheme(name, (1, group_size))))

    return read


READERS: dict[str, Callable[..., Packed]] = {
    "pack-quantized": _pack_quantized,
    "int-quantized": _naive_quantized,
    "float-quantized": _naive_quantized,
    "naive-quantized": _naive_quantized,
    "mxfp8-quantized": _mxfp8_quantized,
    "nvfp4-pack-quantized": _float4_reader(float4.NVFP4),
    "mxfp4-pack-quantized": _float4_reader(float4.MXFP4),
}


def _integers(weights: Mapping[str, Any], where: str) -> QuantScheme:
    strategy, group_size = _strategy(weights), weights.get("group_size")
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


def _float8(module: str, weights: Mapping[str, Any], where: str, name: str) -> Packed:
    kind, bits = weights.get("type"), weights.get("num_bits")
    if (kind, bits) != ("float", 8) or weights.get("symmetric", True) is not True:
        raise UnsupportedModel(
            f"{where}: {kind!r} weights of {bits!r} bits are not read in this format",
            "read: symmetric floats of 8 bits",
        )
    strategy = _strategy(weights)
    blocks: dict[str, object] = {
        "tensor": None,
        "channel": None,
        "group": (1, weights.get("group_size")),
        "block": weights.get("block_structure"),
    }
    if not isinstance(strategy, str) or strategy not in blocks:
        raise UnsupportedModel(
            f"{where}: 8-bit floats by {strategy!r} are not read", f"read: by {', '.join(blocks)}"
        )
    if strategy == "channel":
        block: tuple[int | None, int | None] = (1, None)
    else:
        block = float8.block_of(blocks[strategy], where)
    return Packed(float8.LAYOUT, FloatSpec(module, FloatScheme(name, block)))


def _strategy(weights: Mapping[str, Any]) -> object:
    """By what scales are shared; left out by old writers where the group size says it."""
    strategy, group_size = weights.get("strategy"), weights.get("group_size")
    if strategy is not None:
        return strategy
    if group_size is None:
        return "tensor"
    return "channel" if group_size == -1 else "group"
