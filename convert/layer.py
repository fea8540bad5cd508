"""What the codecs of packed linears share: the spec they unpack by, and their checks.

A codec's `unpack` needs a spec beside the tensors: the words of a file do not say how many bits a
code has, whether zero points are stored less one, or which version of a layout wrote them.
Integers have a `LayerSpec`, small floats and tables a `FloatSpec`; a `Layout` is the pair of
functions that read either. The checks take tensors on the meta device too, so a whole file is
checked from its headers before any work starts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import regex
import torch
from torch import Tensor

from qtool.errors import FormatError, QtoolError, UsageError
from qtool.scheme import FloatScheme, QuantScheme
from qtool.weights import QuantizedWeight, Weight

# A config's regular expression gets this much processor time for one name: a hostile one would
# take for ever.
PATTERN_SECONDS = 1.0
MAX_PATTERN_LENGTH = 100_000


# What a tensor of a packed linear has along an axis: outputs or inputs one by one, packed by 32-bit
# words or in pairs, or groups of inputs.
Axis = Literal["out", "in", "out words", "in words", "in pairs", "groups"]


class Spec(Protocol):
    """What all specs have: whose they are, and what the config declares, for errors."""

    @property
    def module(self) -> str: ...

    @property
    def scheme(self) -> QuantScheme | FloatScheme: ...

    @property
    def file(self) -> str: ...


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One packed linear as its checkpoint's config declares it.

    module  its name in the model, "model.layers.0.mlp.up_proj"; named in errors
    scheme  bits, group and symmetry by the config
    layout  which variant of the format wrote it where there are several, "" where there is one:
            gptq: "gptq" (zeros stored less one) or "gptq_v2"; compressed-tensors: its version
    file    where the tensors lie, for errors
    """

    module: str
    scheme: QuantScheme
    layout: str = ""
    file: str = ""


@dataclass(frozen=True, slots=True)
class FloatSpec:
    """One packed linear of small floats or of places in a table, likewise."""

    module: str
    scheme: FloatScheme
    file: str = ""


@dataclass(frozen=True, slots=True)
class Layout:
    """How the tensors of one packed linear are read.

    suffixes     the tensors that it may have, after "<module>."
    shape_of     [out, in] from headers (meta tensors); raises FormatError where they differ from
                 the spec
    unpack       the weight, from the tensors and the spec
    small        suffixes that `shape_of` needs the contents of, each a few bytes
    scheme_of    the scheme, where the tensors say it better than the config; takes what `shape_of`
                 takes
    zeros_of     zero points from all tensors but the first, None where all are the midpoint, so
                 that the layer is symmetric whatever the config says; absent where the config tells
    group_index  suffix of the tensor that puts inputs in groups (act-order), or None
    axes         what the axes of its tensors are, where a part of the weight can be cut out of
                 them; suffixes that are not listed stay as they are
    states_shape suffix of a tensor that holds [out, in], or None
    """

    suffixes: tuple[str, ...]
    shape_of: Callable[[Mapping[str, Tensor], Any], tuple[int, int]]
    unpack: Callable[[Mapping[str, Tensor], Any], Weight]
    small: tuple[str, ...] = ()
    scheme_of: Callable[[Mapping[str, Tensor], Any], FloatScheme] | None = None
    zeros_of: Callable[[Mapping[str, Tensor], LayerSpec], Tensor | None] | None = None
    group_index: str | None = None
    axes: Mapping[str, tuple[Axis, ...]] = field(default_factory=dict)
    states_shape: str | None = None


class Packed(NamedTuple):
    """One packed linear of a file: how to read it, and what its config says of it."""

    layout: Layout
    spec: LayerSpec | FloatSpec


def scheme_from_config(
    where: str,
    *,
    bits: object,
    group_size: object,
    symmetric: object,
    widths: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8),
) -> QuantScheme:
    """The scheme that a config.json names; FormatError where its values make none.

    where       the file, for errors
    group_size  None or -1 for the whole row
    """
    if type(bits) is not int or bits not in widths:
        known = ", ".join(map(str, widths))
        raise FormatError(f"{where}: weights of {bits!r} bits; this format holds {known}")
    if group_size == -1:
        group_size = None
    if group_size is not None and (type(group_size) is not int or group_size < 1):
        raise FormatError(f"{where}: group size {group_size!r} is not a positive number or -1")
    if not isinstance(symmetric, bool):
        raise FormatError(f"{where}: symmetric is {symmetric!r}, not true or false")
    return QuantScheme(bits, group_size, symmetric)


def pattern_matches(pattern: str, name: str, where: str) -> bool:
    """Whether a regular expression of a config matches from the start of a name.

    Python's own `re` cannot be stopped; this engine, which transformers brings along, can.
    """
    if len(pattern) > MAX_PATTERN_LENGTH:
        raise FormatError(f"{where}: a pattern of {len(pattern):,} characters")
    shown = pattern if len(pattern) < 100 else f"{pattern[:100]}..."
    try:
        return regex.match(pattern, name, timeout=PATTERN_SECONDS) is not None
    except TimeoutError:
        raise FormatError(f"{where}: pattern {shown!r} takes too long to match {name}") from None
    except (regex.error, RecursionError, OverflowError, MemoryError) as error:
        raise FormatError(f"{where}: {shown!r} is no regular expression: {error}") from None


def malformed(spec: Spec, suffix: str, problem: str) -> FormatError:
    where = f"{spec.file}: " if spec.file else ""
    return FormatError(f"{where}{spec.module}.{suffix} {problem} (config.json: {spec.scheme})")


def require(
    tensors: Mapping[str, Tensor],
    suffix: str,
    spec: Spec,
    *,
    ndim: int,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """The tensor under a suffix, present and with the number of axes and dtype of the layout."""
    if suffix not in tensors:
        raise malformed(spec, suffix, "is missing")
    tensor = tensors[suffix]
    if tensor.ndim != ndim:
        raise malformed(spec, suffix, f"has shape {list(tensor.shape)}, not {ndim} axes")
    if dtype is not None and tensor.dtype != dtype:
        raise malformed(spec, suffix, f"is {_name(tensor.dtype)}, not {_name(dtype)}")
    return tensor


def expect_shape(tensor: Tensor, shape: tuple[int, ...], spec: Spec, suffix: str) -> None:
    if tuple(tensor.shape) != shape:
        raise malformed(spec, suffix, f"has shape {list(tensor.shape)}, not {list(shape)}")


def expect_floating(tensor: Tensor, spec: Spec, suffix: str) -> None:
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise malformed(spec, suffix, f"is {_name(tensor.dtype)}, not a floating-point type")


def whole_groups(spec: LayerSpec, suffix: str, in_features: int) -> int:
    """Groups in a row of a file's weight; raises FormatError where they do not divide it."""
    width = spec.scheme.group_size or in_features
    if in_features == 0 or in_features % width:
        raise malformed(spec, suffix, f"has {in_features} inputs, not whole groups of {width}")
    return in_features // width


def refuse_groups(
    format_name: str, scheme: QuantScheme, in_features: int, sizes: tuple[int, ...]
) -> str | None:
    """Why a format cannot hold a scheme's groups on rows of `in_features`, or None.

    sizes  the group sizes that the format's kernels take, beside the whole row
    """
    group_size = scheme.group_size
    if group_size is None:
        return None
    if group_size not in sizes:
        known = ", ".join(map(str, sizes))
        return f"{format_name} takes groups of {known} or the whole row, not {group_size}"
    if in_features % group_size:
        return f"{in_features} inputs are not a multiple of group size {group_size}"
    return None


def check_group_index(
    tensors: Mapping[str, Tensor], suffix: str, in_features: int, spec: LayerSpec
) -> None:
    if suffix not in tensors:
        return
    g_idx = require(tensors, suffix, spec, ndim=1)
    expect_shape(g_idx, (in_features,), spec, suffix)
    if g_idx.dtype not in (torch.int32, torch.int64):
        raise malformed(spec, suffix, f"is {_name(g_idx.dtype)}, not int32")


def half_scales(scales: Tensor) -> Tensor:
    """Scales as fp16, for the layouts that know no other type.

    Exact for what `qtool quantize` writes (bf16 values of at least 2**-14). A scale past fp16's
    range would come out infinite, so it is refused here and not found by a reader.
    """
    half = scales.to(torch.float16)
    if not bool(half.isfinite().all()):
        largest = float(scales.abs().max())
        raise QtoolError(
            f"a scale of {largest:g} does not fit fp16, whose largest value is 65504",
            "keep compressed-tensors for this model: it stores scales in the model's own type",
        )
    return half


def one_scheme(format_name: str, quantized: Mapping[str, QuantScheme]) -> QuantScheme:
    """The bits and group size that all layers share, for formats whose config has room for one."""
    if not quantized:
        raise QtoolError(f"no linear is quantized, so there is nothing to write as {format_name}")
    first_module, first = next(iter(quantized.items()))
    for module, scheme in quantized.items():
        if (scheme.bits, scheme.group_size) != (first.bits, first.group_size):
            raise UsageError(
                f"{format_name} files hold one scheme, but {first_module} is {first} "
                f"and {module} is {scheme}",
                "write compressed-tensors, which holds a scheme for each layer, "
                "or quantize with one --group-size",
            )
    return first


def is_act_order(g_idx: Tensor, scheme: QuantScheme) -> bool:
    """Whether inputs lie in groups out of order.

    g_idx  [in], the group of each input; all -1 where a writer left it unset
    """
    if bool((g_idx == -1).all()):
        return False
    in_features = g_idx.shape[0]
    plain = torch.arange(in_features) // scheme.group_width(in_features)
    return not bool((g_idx == plain).all())


def dequantize_act_order(weight: QuantizedWeight, g_idx: Tensor, spec: LayerSpec) -> Tensor:
    """Dequantize a weight whose input k belongs to group g_idx[k].

    No `QuantizedWeight` can say that, so what comes back is dense: [out, in] float32.
    `weight` is what the file holds when its groups are taken to lie in order.
    """
    groups = g_idx.long()
    if int(groups.min()) < 0 or int(groups.max()) >= weight.scales.shape[1]:
        raise malformed(spec, "g_idx", f"names a group outside 0..{weight.scales.shape[1] - 1}")
    if weight.zeros is None:
        zeros = torch.tensor(float(weight.scheme.midpoint))
    else:
        zeros = weight.zeros[:, groups].float()
    return weight.scales.float()[:, groups] * (weight.codes.float() - zeros)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
