"""Weights whose codes a GGUF type has already: they are carried over, not rounded again.

    source                                        type      what changes
    symmetric int2 to int4                        Q4_0      nothing
    symmetric int5 to int8                        Q8_0      nothing
    int2 to int4 with zero points                 Q4_1      minima are rounded to half precision
    4-bit floats with power-of-two scales (mxfp4) MXFP4     nothing

in groups of whole blocks of 32. Q4_0, Q4_1 and Q8_0 hold half-precision scales: where a source's
are of another type they may move by that type's rounding, which is reported, and no further.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.formats import Held
from qtool.convert.gguf.blocks.legacy import (
    BLOCK,
    half_scale_error,
    pack_q4_0,
    pack_q4_1,
    pack_q8_0,
    repack_type,
)
from qtool.errors import QtoolError
from qtool.weights import CodebookWeight, QuantizedWeight, Weight

# Each type that keeps codes, with the file type that is noted for a file of them. The first that a
# model has codes for is its file's, where none is asked for.
CODE_TYPES = {"Q4_0": "Q4_0", "Q4_1": "Q4_1", "Q8_0": "Q8_0", "MXFP4": "MXFP4_MOE"}
# A scale may move by half precision's rounding; more is not repacking.
MAX_SCALE_ERROR = 2.0**-10
_PACKERS = {"Q4_0": pack_q4_0, "Q4_1": pack_q4_1, "Q8_0": pack_q8_0}
_MXFP4_KIND = "mxfp4-g32"
_EXPONENT_BIAS = 127


def code_type(held: Held) -> str | None:
    """The type that has a linear's codes, or None."""
    if held.scheme is not None:
        return repack_type(held.scheme, held.shape[-1])
    return "MXFP4" if held.kind == _MXFP4_KIND else None


def require_scales(module: str, weight: Weight, type: str) -> tuple[str, ...]:
    """What happens to a weight's scales, in words; raises where too much does."""
    if not isinstance(weight, QuantizedWeight):
        return ()
    error = half_scale_error(weight)
    if error > MAX_SCALE_ERROR:
        raise QtoolError(
            f"{module}: half precision changes its scales by {error:.2g} of them, "
            f"so {type} cannot hold it",
            "choose a --type that quantizes again, such as Q4_K_M",
        )
    if error == 0:
        return ()
    return (f"{module}: scales rounded to half precision, by up to {error:.2g} of one",)


def repack(weight: Weight, type: str) -> Tensor:
    """The bytes of a weight in the type that has its codes, uint8 [out, row_bytes]."""
    if isinstance(weight, CodebookWeight):
        return _pack_mxfp4(weight)
    assert isinstance(weight, QuantizedWeight), weight
    return _PACKERS[type](weight, max_scale_error=MAX_SCALE_ERROR)


def _pack_mxfp4(weight: CodebookWeight) -> Tensor:
    """Blocks of 32: e, then the codes of j and j + 16 in byte j.

    Codes are E2M1's in both. GGUF's e stands for 2**(e - 128) times doubled values, so it is the
    exponent byte of a scale 2**(e - 127).
    """
    mantissa, exponent = torch.frexp(weight.scales)  # scale = mantissa * 2**exponent
    if not bool((mantissa == 0.5).all()):
        raise QtoolError("a scale of an mxfp4 weight is no power of two", "the file is damaged")
    first = (exponent - 1 + _EXPONENT_BIAS).to(torch.uint8).unsqueeze(1)
    codes = weight.codes.reshape(-1, 2, BLOCK // 2)
    blocks = torch.cat((first, codes[:, 0] | codes[:, 1] << 4), dim=1)
    return blocks.view(weight.shape[0], -1)
