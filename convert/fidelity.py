"""How closely each target can hold each kind of weight: the facts that plans are made of.

    lossless       the target's weights equal the source's, as float32; codes may get more bits
    near-lossless  the same codes with scales or minima, or the same values, rounded to a narrower
                   float: relative errors of 2**-8 at most, measured when the file is written
    requantizes    the codes do not fit: weights are rounded a second time
    no             the target holds quantized weights, and the source is not quantized

`carry` decides one linear; `qtool convert` plans by it, and matrix.py prints what it says of every
pair of formats.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import torch

from qtool.convert.formats import ACT_ORDER, FORMATS, Held
from qtool.convert.gguf.repack import code_type
from qtool.convert.gguf.types import TENSOR_TYPES
from qtool.scheme import QuantScheme

Level = Literal["lossless", "near-lossless", "requantizes", "no"]

DENSE_TARGET = "hf"
GGUF_TARGET = "gguf"
TARGETS = (GGUF_TARGET, "marlin", "gptq", "awq", "compressed-tensors", DENSE_TARGET)

# Blocks of bytes whose codes are integers as other formats have them.
INTEGER_BLOCKS = {"Q4_0": QuantScheme(4, 32), "Q8_0": QuantScheme(8, 32)}
# Types that hold the floats of a type exactly. float16 holds those of bfloat16 down to 2**-14, and
# few scales lie below; where one does, the conversion finds and measures it.
HELD_BY: dict[str, tuple[str, ...]] = {
    "float16": ("float16", "float32"),
    "bfloat16": ("bfloat16", "float16", "float32"),
    "float32": ("float32",),
}


class Carry(NamedTuple):
    """A level, why it is no better (None where nothing is lost), and in a packed target the scheme
    of the codes that are kept.
    """

    level: Level
    why: str | None = None
    scheme: QuantScheme | None = None


def carry(held: Held, target: str, dtype: torch.dtype) -> Carry:
    """What becomes of a linear in a target, at best and without a --type.

    dtype  of the target's dense tensors and, in compressed-tensors, of its scales
    """
    name = str(dtype).removeprefix("torch.")
    if target == DENSE_TARGET:
        if name == held.kind or dtype == torch.float32:
            return Carry("lossless")
        return Carry("near-lossless", f"values are rounded to {name}; --type f32 keeps them")
    if target == GGUF_TARGET:
        return _to_gguf(held)
    if held.is_plain:
        return Carry("no", f"{target} holds quantized weights, and {held.kind} is not quantized")
    scheme = integer_scheme(held)
    if scheme is None:
        return Carry("requantizes", _no_room(held, target))
    kept = _with_room(scheme, target, held)
    if kept is None:
        return Carry("requantizes", FORMATS[target].refuses(scheme, *_sides(held)))
    found = _rounded_scales(held, name if target == "compressed-tensors" else "float16")
    return found._replace(scheme=kept)


def integer_scheme(held: Held) -> QuantScheme | None:
    """The scheme of integer codes, GGUF's blocks of them included."""
    return held.scheme or INTEGER_BLOCKS.get(held.kind)


def _with_room(scheme: QuantScheme, target: str, held: Held) -> QuantScheme | None:
    """The scheme or the narrowest wider one that a target takes: int3 codes are int4 codes."""
    for bits in range(scheme.bits, 9):
        wider = replace(scheme, bits=bits)
        if FORMATS[target].refuses(wider, *_sides(held)) is None:
            return wider
    return None


def _sides(held: Held) -> tuple[int, int]:
    return held.shape[0], held.shape[1]


def _to_gguf(held: Held) -> Carry:
    """Codes stay where a block type has them; all else becomes Q4_K_M."""
    if held.is_plain:
        return Carry("requantizes", "becomes Q4_K_M; --type F32, F16 or BF16 keep the values")
    if held.kind in TENSOR_TYPES:
        return Carry("lossless")
    kept = code_type(held)
    if kept is None:
        return Carry("requantizes", f"no block type has the codes of {held.kind}: becomes Q4_K_M")
    if kept == "MXFP4":
        return Carry("lossless")
    if kept == "Q4_1":
        return Carry("near-lossless", "kept as Q4_1, whose minima are rounded to float16")
    return _rounded_scales(held, "float16")


def _rounded_scales(held: Held, type: str) -> Carry:
    scales = held.scales or ("float16" if held.kind in INTEGER_BLOCKS else type)
    if type in HELD_BY.get(scales, ()):
        return Carry("lossless")
    return Carry("near-lossless", f"{scales} scales are rounded to {type}")


def _no_room(held: Held, target: str) -> str:
    if held.kind.endswith(ACT_ORDER):
        return f"its groups are out of order (act-order), and {target} groups neighbours"
    return f"{target} cannot hold {held.kind} without requantizing"
