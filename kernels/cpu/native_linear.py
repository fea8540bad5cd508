"""Linears with 2 to 8-bit codes and group scales, on activations rounded to 8 bits on the fly.

Each token's inputs are rounded in spans of up to 128, by their largest magnitude, as llama.cpp
does in blocks of 32; `csrc/linear.cpp` has the arithmetic. It costs 0.6 to 0.8 % of a layer's
output in relative error on Gaussian data. In return the weights are read as they are packed, 4 or
8 bits each, and multiplied by integer instructions (VNNI, or AVX2's). Products of integers are
exact and spans are summed in one order, so that a token's result has the same bits at any batch
size, with any number of threads, on any of the instruction sets.

It is done by default where activations are in bfloat16; float32 was chosen for exactness and is
left alone, and `activations` (QTOOL_ACTIVATIONS) says otherwise. The reason is that it costs
nothing that a model of 4-bit weights would notice and is several times faster. On the bundled model
in int4 (rtn-int4, the second halves of 16 windows of 256 tokens of its evaluation text), against
float32:

    activations   head    KV cache    perplexity    KL divergence
    float32                              39.108
    bfloat16      bf16                   39.118        0.7e-4
    int8          bf16                   39.109        2.0e-4
    int8          int8                   39.119        2.5e-4
    int8          int8    int8           39.090        2.6e-4
    int8          int4                   39.428       54.6e-4

Artifacts whose weights and activations are both meant to be int8 run by the same kernel. On one
core of Zen 4, 9728 x 896 and 4096 x 4096, it takes 0.35 of the CPU time that rounding in torch and
`onednn.qlinear_pointwise` take with one token, 0.35 to 0.5 with 4, 0.65 with 16, 0.9 to 1 with 128.

On one core of a busy Zen 4 that read 20 to 27 GB/s meanwhile, torch 2.13, over the layers of
Qwen2.5-0.5B and a 4096 x 4096 one, groups of 128, weights from memory
(`benchmarks/kernels_cpu.py --threads 1`):

                      1 token         4 tokens         16 tokens        64 tokens
    native, int4      16-23 GB/s      246-323 GOP/s    308-355 GOP/s    354-378 GOP/s
    torch int4pack    9-10 GB/s       81-87 GOP/s      86-88 GOP/s      58-88 GOP/s
    native, int8      18-31 GB/s      136-183 GOP/s    270-331 GOP/s    329-369 GOP/s
    torch bfloat16    11-27 GB/s      45-92 GOP/s      88-166 GOP/s     99-204 GOP/s

A layer takes the bytes that its file has. Codes are held in 2, 3, 4, 5, 6 or 8 bits (1 and 7 in the
next wider), scales as float16 where that holds all of them exactly (it does for bfloat16 scales as
`grid.round_scales` leaves them). GGUF blocks are moved, not converted: K-quants keep their scales
of 4 to 8 bits with a float16 for 256 weights, MXFP4 its exponents, the IQ4 types their table. What
grows is the last panel of 32 rows, if it is not full. Types that are not in BLOCKS are unpacked by
other kernels.
"""

import ctypes
from ctypes import c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.kernels.cpu.native import ELEMENT_TYPES, Native, load
from qtool.native_build import Missing
from qtool.settings import Rounding, settings
from qtool.weights import BlockWeight, QuantizedWeight, Weight

PANEL_ROWS = 32
# Inputs that share a scale of the activations, at most; and what their number is a multiple of.
MAX_SPAN = 128
STRIP = 32
SUPER = 256
CODE_BITS = (2, 3, 4, 5, 6, 8)


class LinearRecord(ctypes.Structure):
    """QtoolLinear of csrc/interface.h."""

    _fields_ = (
        ("codes", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("zeros", c_void_p),
        ("fields", c_void_p),
        ("table", c_void_p),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("group", c_int64),
        ("step", c_int64),
        ("span", c_int64),
        ("bits", c_int32),
        ("scale_type", c_int32),
        ("midpoint", c_int32),
        ("scale_kind", c_int32),
    )


@dataclass(frozen=True, slots=True)
class _Block:
    """A GGUF block type as the kernel holds it.

    number      ggml's
    group       weights of one scale
    field_bytes a super-block's scales that are codes themselves, a row; scale_kind says how
                (ScaleKind of csrc/interface.h); 0: scales are float16 and plain
    table       what codes mean, plus the midpoint; empty: themselves
    """

    number: int
    bits: int
    group: int
    midpoint: int
    has_offsets: bool = False
    field_bytes: int = 0
    scale_kind: int = 0
    table: tuple[int, ...] = ()


_IQ4 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_FP4 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
BLOCKS = {
    "Q4_0": _Block(2, 4, 32, 8),
    "Q4_1": _Block(3, 4, 32, 0, has_offsets=True),
    "Q5_0": _Block(6, 5, 32, 16),
    "Q5_1": _Block(7, 5, 32, 0, has_offsets=True),
    "Q8_0": _Block(8, 8, 32, 128),
    "Q2_K": _Block(10, 2, 16, 0, has_offsets=True, field_bytes=16, scale_kind=4),
    "Q3_K": _Block(11, 3, 16, 4, field_bytes=12, scale_kind=2),
    "Q4_K": _Block(12, 4, 32, 0, has_offsets=True, field_bytes=12, scale_kind=1),
    "Q5_K": _Block(13, 5, 32, 0, has_offsets=True, field_bytes=12, scale_kind=1),
    "Q6_K": _Block(14, 6, 16, 32, field_bytes=16, scale_kind=3),
    "IQ4_NL": _Block(20, 4, 32, 128, table=tuple(128 + value for value in _IQ4)),
    "IQ4_XS": _Block(
        *(23, 4, 32, 128),
        field_bytes=6,
        scale_kind=5,
        table=tuple(128 + value for value in _IQ4),
    ),
    "TQ2_0": _Block(35, 2, 256, 1),
    "MXFP4": _Block(39, 4, 32, 128, table=tuple(128 + value for value in _FP4)),
}


class NativePacked(NamedTuple):
    """codes uint8; scales, offsets, zeros, fields and table as csrc/interface.h has them.

    record  points into them, which live as long as it does
    """

    codes: Tensor
    scales: Tensor
    offsets: Tensor | None
    zeros: Tensor | None
    fields: Tensor | None
    table: Tensor | None
    record: LinearRecord
    out_features: int
    in_features: int
    native: Native


def takes(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight) or (
        isinstance(weight, BlockWeight) and weight.codec.name in BLOCKS
    )


def refuses(
    weight: QuantizedWeight | BlockWeight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    if isinstance(weight, QuantizedWeight):
        group = weight.scheme.group_width(weight.shape[1])
        if group % STRIP:
            return f"takes groups of a multiple of {STRIP} inputs, these have {group}"
    return refuses_any(dtype, device, activations)


def refuses_any(
    dtype: torch.dtype, device: torch.device, activations: Rounding | None
) -> str | None:
    """What it has against every weight, or None."""
    if device.type != "cpu":
        return f"runs on cpu, not {device.type}"
    if dtype not in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        return f"takes bfloat16 or float32 activations, these are {name}"
    asked = activations or settings().activations
    if asked == "bf16":
        return "rounds activations to 8 bits, and bf16 was asked for"
    if asked == "llama.cpp":
        return "rounds activations in blocks of its own, and llama.cpp's were asked for"
    if asked is None and dtype == torch.float32:
        return "rounds activations to 8 bits, which float32 is there to avoid"
    native = load()
    return native.reason if isinstance(native, Missing) else None


def pack(
    weight: QuantizedWeight | BlockWeight, dtype: torch.dtype, device: torch.device
) -> NativePacked:
    native = load()
    assert isinstance(native, Native), "refuses() said that the kernels are there"
    return pack_for(native, weight)


def pack_for(native: Native, weight: QuantizedWeight | BlockWeight) -> NativePacked:
    if isinstance(weight, BlockWeight):
        return _pack_blocks(native, weight)
    return _pack_codes(native, weight)


def _pack_codes(native: Native, weight: QuantizedWeight) -> NativePacked:
    out_features, in_features = weight.shape
    bits = next(width for width in CODE_BITS if width >= weight.scheme.bits)
    source = weight.codes.contiguous()
    codes = _codes(native, out_features, in_features, bits)
    native.library.qtool_pack_codes(
        source.data_ptr(),
        out_features,
        in_features,
        bits,
        codes.data_ptr(),
        torch.get_num_threads(),
    )
    wide = weight.scales.float()
    narrow = wide.half()
    scales = _in_panels(native, narrow if torch.equal(narrow.float(), wide) else wide)
    return _packed(
        native,
        (out_features, in_features),
        codes,
        scales,
        zeros=None if weight.zeros is None else _in_panels(native, weight.zeros),
        bits=bits,
        group=weight.scheme.group_width(in_features),
        midpoint=weight.scheme.midpoint,
    )


def _pack_blocks(native: Native, weight: BlockWeight) -> NativePacked:
    block = BLOCKS[weight.codec.name]
    out_features, in_features = weight.shape
    panels = -(-out_features // PANEL_ROWS)
    codes = _codes(native, out_features, in_features, block.bits)
    per_scale = SUPER if block.field_bytes else block.group
    if per_scale == SUPER or weight.codec.name != "MXFP4":
        scale_type = torch.float16
    else:
        scale_type = torch.uint8
    zeros, shape = native.memory.zeros, (panels, in_features // per_scale, PANEL_ROWS)
    scales = zeros(shape, scale_type)
    offsets = zeros(shape, scale_type) if block.has_offsets else None
    fields = None
    if block.field_bytes:
        size = (panels, in_features // SUPER, block.field_bytes * PANEL_ROWS)
        fields = zeros(size, torch.uint8)
    source = weight.data.contiguous()
    native.library.qtool_pack_blocks(
        block.number,
        source.data_ptr(),
        out_features,
        in_features,
        codes.data_ptr(),
        scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        None if fields is None else fields.data_ptr(),
        torch.get_num_threads(),
    )
    return _packed(
        native,
        (out_features, in_features),
        codes,
        scales,
        offsets=offsets,
        fields=fields,
        table=torch.tensor(block.table, dtype=torch.uint8) if block.table else None,
        bits=block.bits,
        group=block.group,
        midpoint=block.midpoint,
        scale_kind=block.scale_kind,
    )


def pack_matrix(native: Native, values: Tensor) -> NativePacked:
    """values [out, in] bfloat16 or float32, rounded to 8 bits with one scale a row."""
    out_features, in_features = values.shape
    values = values.contiguous()
    codes = _codes(native, out_features, in_features, 8)
    scales = native.memory.zeros((len(codes), 1, PANEL_ROWS), torch.float32)
    native.library.qtool_pack_matrix(
        values.data_ptr(),
        ELEMENT_TYPES[values.dtype],
        out_features,
        in_features,
        codes.data_ptr(),
        scales.data_ptr(),
        torch.get_num_threads(),
    )
    shape = (out_features, in_features)
    return _packed(native, shape, codes, scales, bits=8, group=in_features, midpoint=128)


def _packed(
    native: Native,
    shape: tuple[int, int],
    codes: Tensor,
    scales: Tensor,
    *,
    offsets: Tensor | None = None,
    zeros: Tensor | None = None,
    fields: Tensor | None = None,
    table: Tensor | None = None,
    bits: int,
    group: int,
    midpoint: int,
    scale_kind: int = 0,
) -> NativePacked:
    step = next(size for size in (MAX_SPAN, 64, STRIP, STRIP // 2) if group % size == 0)
    parts = [codes, scales, offsets, zeros, fields, table]
    addresses = [None if part is None else part.data_ptr() for part in parts]
    span = max(step, STRIP)
    scale_type = ELEMENT_TYPES[scales.dtype]
    record = LinearRecord(
        *addresses, *shape, group, step, span, bits, scale_type, midpoint, scale_kind
    )
    return NativePacked(codes, scales, offsets, zeros, fields, table, record, *shape, native)


def _codes(native: Native, out_features: int, in_features: int, bits: int) -> Tensor:
    """Zeros for the codes."""
    panels = -(-out_features // PANEL_ROWS)
    shape = (panels, in_features // STRIP, STRIP * PANEL_ROWS * bits // 8)
    return native.memory.zeros(shape, torch.uint8)


def _in_panels(native: Native, per_group: Tensor) -> Tensor:
    """[out, groups] -> [panels, groups, 32], zero past the last row."""
    padded = F.pad(per_group, (0, 0, 0, -per_group.shape[0] % PANEL_ROWS))
    by_panel = padded.view(-1, PANEL_ROWS, per_group.shape[1]).transpose(1, 2)
    return native.memory.zeros(by_panel.shape, by_panel.dtype).copy_(by_panel)


def matmul(
    x: Tensor, packed: NativePacked, bias: Tensor | None, out_dtype: torch.dtype | None = None
) -> Tensor:
    """x [tokens, in] float32 or bfloat16 -> [tokens, out] of the same type, or of float32."""
    tokens, in_features = x.shape
    dtype = out_dtype or x.dtype
    assert in_features == packed.in_features
    assert x.dtype in (torch.float32, torch.bfloat16)
    assert dtype in (x.dtype, torch.float32)
    x = x.contiguous()
    address = None
    if bias is not None:
        bias = bias.to(dtype).contiguous()
        address = bias.data_ptr()
    y = x.new_empty(tokens, packed.out_features, dtype=dtype)
    library, record = packed.native.library, ctypes.addressof(packed.record)
    scratch = torch.empty(library.qtool_linear_scratch(record, tokens), dtype=torch.uint8)
    library.qtool_linear(
        record,
        x.data_ptr(),
        ELEMENT_TYPES[x.dtype],
        tokens,
        address,
        y.data_ptr(),
        ELEMENT_TYPES[dtype],
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return y
