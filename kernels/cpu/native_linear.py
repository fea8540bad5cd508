"""Linears with 2 to 8-bit codes and group scales, on activations rounded to 8 bits on the fly.

Each token's inputs are rounded in units of up to 128, by their largest magnitude, as llama.cpp
does in blocks of 32; `csrc/linear.cpp` has the arithmetic. It costs 0.6 to 0.8 % of a layer's
output in relative error on Gaussian data. In return the weights are read as they are packed, 4 or
8 bits each, and multiplied by integer instructions (VNNI, or AVX2's). Products of integers are
exact and units are summed in one order, so that a token's result has the same bits at any batch
size, with any number of threads, on any of the instruction sets.

Rounding activations is the user's choice (QTOOL_ACTIVATIONS); INT8_ACTIVATIONS_BY_DEFAULT is what
happens without one, for bfloat16. float32 was chosen for exactness and is left alone. What the
choice is about, on one core of a busy Zen 4 that read 20 to 27 GB/s meanwhile, torch 2.13, over the
layers of Qwen2.5-0.5B and a 4096 x 4096 one, groups of 128, weights from memory
(`benchmarks/kernels_cpu.py --threads 1`):

                      1 token         4 tokens         16 tokens        64 tokens
    native, int4      16-23 GB/s      246-323 GOP/s    308-355 GOP/s    354-378 GOP/s
    torch int4pack    9-10 GB/s       81-87 GOP/s      86-88 GOP/s      58-88 GOP/s
    native, int8      18-31 GB/s      136-183 GOP/s    270-331 GOP/s    329-369 GOP/s
    torch bfloat16    11-27 GB/s      45-92 GOP/s      88-166 GOP/s     99-204 GOP/s

and what it costs, on the bundled model in int4 (rtn-int4, 64 windows of 256 tokens of its
evaluation text): perplexity 46.582 with float32 activations, 46.581 with bfloat16, 46.584 with
int8; KL divergence to float32 activations 0.7e-4 with bfloat16, 2.2e-4 with int8.

Codes of 2 to 4 bits are held in 4, those of 5 to 8 in 8. Scales are held as float16 where that
holds all of them exactly (it does for bfloat16 scales as `grid.round_scales` leaves them), so a
layer takes the bytes that its file has.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.kernels.cpu.native import ELEMENT_TYPES, Native, load
from qtool.native_build import Missing
from qtool.settings import settings
from qtool.weights import QuantizedWeight, Weight

INT8_ACTIVATIONS_BY_DEFAULT = False
PANEL_ROWS = 32
# Inputs that share a scale of the activations, at most; and what their number is a multiple of.
MAX_UNIT = 128
STRIP = 32


class _Record(ctypes.Structure):
    """QtoolLinear of csrc/interface.h."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("group", c_int64),
        ("unit", c_int64),
        ("bits", c_int32),
        ("scale_type", c_int32),
        ("midpoint", c_int32),
    )


class NativePacked(NamedTuple):
    """codes [panels, in * bits / 8, 32] uint8; scales, zeros [panels, groups, 32].

    record  points into the three, which live as long as it does
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    record: _Record
    out_features: int
    in_features: int
    unit: int
    native: Native


def takes(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight)


def refuses(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> str | None:
    if device.type != "cpu":
        return f"runs on cpu, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        return f"takes bfloat16 or float32 activations, these are {name}"
    group = weight.scheme.group_width(weight.shape[1])
    if group % STRIP:
        return f"takes groups of a multiple of {STRIP} inputs, these have {group}"
    asked = settings().activations
    if asked == "bf16":
        return "rounds activations to 8 bits, and QTOOL_ACTIVATIONS asks for bf16"
    if asked is None and dtype == torch.float32:
        return "rounds activations to 8 bits, which float32 is there to avoid"
    if asked is None and not INT8_ACTIVATIONS_BY_DEFAULT:
        return "rounds activations to 8 bits, which QTOOL_ACTIVATIONS=int8 asks for"
    native = load()
    return native.reason if isinstance(native, Missing) else None


def pack(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> NativePacked:
    native = load()
    assert isinstance(native, Native), "refuses() said that the kernels are there"
    return pack_for(native, weight)


def pack_for(native: Native, weight: QuantizedWeight) -> NativePacked:
    out_features, in_features = weight.shape
    bits = 4 if weight.scheme.bits <= 4 else 8
    group = weight.scheme.group_width(in_features)
    unit = next(size for size in (MAX_UNIT, 64, STRIP) if group % size == 0)
    panels = -(-out_features // PANEL_ROWS)
    source = weight.codes.contiguous()
    codes = torch.empty(panels, in_features * bits // 8, PANEL_ROWS, dtype=torch.uint8)
    native.library.qtool_pack_codes(
        source.data_ptr(),
        out_features,
        in_features,
        bits,
        codes.data_ptr(),
        codes.numel(),
        torch.get_num_threads(),
    )
    wide = weight.scales.float()
    narrow = wide.half()
    scales = _in_panels(narrow if torch.equal(narrow.float(), wide) else wide)
    zeros = None if weight.zeros is None else _in_panels(weight.zeros)
    record = _Record(
        codes.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        out_features,
        in_features,
        group,
        unit,
        bits,
        ELEMENT_TYPES[scales.dtype],
        weight.scheme.midpoint,
    )
    return NativePacked(codes, scales, zeros, record, out_features, in_features, unit, native)


def _in_panels(per_group: Tensor) -> Tensor:
    """[out, groups] -> [panels, groups, 32], zero past the last row."""
    padded = F.pad(per_group, (0, 0, 0, -per_group.shape[0] % PANEL_ROWS))
    groups = per_group.shape[1]
    return padded.view(-1, PANEL_ROWS, groups).transpose(1, 2).contiguous()


def matmul(x: Tensor, packed: NativePacked, bias: Tensor | None) -> Tensor:
    """x [tokens, in] float32 or bfloat16 -> [tokens, out] of the same type."""
    tokens, in_features = x.shape
    assert in_features == packed.in_features
    assert x.dtype in (torch.float32, torch.bfloat16)
    x = x.contiguous()
    address = None
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
        address = bias.data_ptr()
    y = x.new_empty(tokens, packed.out_features)
    # Codes, then a scale and a sum of 4 bytes for each unit; see Activations in csrc/linear.cpp.
    units = in_features // packed.unit
    scratch = torch.empty(tokens * (in_features + 8 * units) + 64, dtype=torch.uint8)
    packed.native.library.qtool_linear(
        ctypes.addressof(packed.record),
        x.data_ptr(),
        tokens,
        address,
        y.data_ptr(),
        ELEMENT_TYPES[x.dtype],
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y
