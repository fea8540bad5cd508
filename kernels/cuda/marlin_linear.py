"""Linears with weights of 4 or 8 bits and activations in 16, from Marlin words as they lie.

    y = x W^T,  W = (code - zero) * scale        a scale for a group of 32, 64, 128 inputs or a row

What is read is half a byte a weight, so that up to some tens of rows the product takes as long as
the weight takes to come from memory. Only few instructions a weight fit into that time (an H200 has
22 for eight weights, at the rate that it issues them): the layout leaves none to be spent on
exchange, scales are applied to sums and not to weights, and a zero point (8 for symmetric codes) is
one multiplication by the group's sum of inputs, which whoever makes the inputs can add up:

    sum_k x[k] (code[k] - zero) = sum_k x[k] (bias + code[k])  -  (bias + zero) sum_k x[k]

Small products are split over the inputs, to keep every multiprocessor busy. The parts are added in
the order of the inputs by the kernel that reads them next, or by `add_parts`: no atomics, the same
bits every time. For many rows the weight is unpacked once, and multiplied as a dense one.

The kernel needs 4 or 8 bits (8 symmetric), inputs in blocks of 16 and outputs in strips of 64.
Codes of 2, 3, 5, 6 and 7 bits are widened.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qtool.convert.marlin import tile
from qtool.convert.packing import pack as pack_fields
from qtool.kernels.cuda.launch import Launch, obstacle
from qtool.kernels.cuda.tuning import LinearShape, LinearTile, linear_tile, rows_to_unpack_at
from qtool.scheme import QuantScheme
from qtool.settings import Rounding
from qtool.weights import QuantizedWeight, Weight

GROUPS = (32, 64, 128)
# Inputs that are multiplied at once where a whole row has one scale.
WHOLE_ROW_BLOCK = 128
STRIP = 64
# What codes of 4 bits carry once their exponent is set: 128 + q in bfloat16, 1024 + q in float16.
BIASES = {torch.bfloat16: 128, torch.float16: 1024, torch.float32: 0}


class MarlinPacked(NamedTuple):
    """Words and scales of one weight [out, in], or of as many as there are experts.

    words   [in / 16, out * bits / 2] int32, experts first where there are some
    scales  [groups, out] floating, in the order of the outputs
    zeros   [groups, out] uint8, or None where the scheme is symmetric
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    block: int
    out_features: int
    in_features: int

    @property
    def whole_row(self) -> bool:
        return self.scales.shape[-2] == 1

    def shape_for(self, rows: int) -> LinearShape:
        return LinearShape(rows, self.out_features, self.in_features, self.bits, self.block)


def takes(weight: Weight) -> bool:
    return isinstance(weight, QuantizedWeight) and weight.scheme.bits <= 8


def refuses(
    weight: QuantizedWeight,
    dtype: torch.dtype,
    device: torch.device,
    activations: Rounding | None,
) -> str | None:
    """Why these kernels cannot multiply by the weight; None if they can."""
    found = obstacle(device)
    if found is not None:
        return found
    if dtype not in (torch.bfloat16, torch.float16):
        return f"takes activations in 16 bits, these are {str(dtype).removeprefix('torch.')}"
    return refuses_shape(weight.scheme, weight.shape)


def refuses_shape(scheme: QuantScheme, shape: tuple[int, int]) -> str | None:
    out_features, in_features = shape
    if scheme.bits > 4 and not scheme.symmetric:
        return f"takes zero points with codes of 2 to 4 bits, these have {scheme.bits}"
    group = scheme.group_width(in_features)
    whole_row = scheme.num_groups(in_features) == 1
    if not whole_row and group not in GROUPS:
        return f"takes groups of {', '.join(map(str, GROUPS))} or a row, these have {group}"
    block = WHOLE_ROW_BLOCK if whole_row and group not in GROUPS else group
    if in_features % block:
        return f"takes inputs in blocks of {block}, these are {in_features}"
    if out_features % STRIP:
        return f"takes outputs in strips of {STRIP}, these are {out_features}"
    return None


def pack(weight: QuantizedWeight, dtype: torch.dtype, device: torch.device) -> MarlinPacked:
    """Of a weight that `refuses_shape` has nothing against."""
    assert refuses_shape(weight.scheme, weight.shape) is None, weight.scheme
    bits = 4 if weight.scheme.bits <= 4 else 8
    wide = weight if weight.scheme.bits == bits else weight.widened(bits)
    out_features, in_features = wide.shape
    group = wide.scheme.group_width(in_features)
    # Where the codes are on the device already, or are brought there, this takes no time.
    words = pack_fields(tile(wide.codes.to(device), bits), bits)
    zeros = wide.zeros
    return MarlinPacked(
        words=words.contiguous(),
        scales=_narrow(wide.scales.t()).to(device).contiguous(),
        zeros=None if zeros is None else zeros.t().to(device, torch.uint8).contiguous(),
        bits=bits,
        block=group if group in GROUPS else WHOLE_ROW_BLOCK,
        out_features=out_features,
        in_features=in_features,
    )


def _narrow(scales: Tensor) -> Tensor:
    """In 16 bits where that loses nothing."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales.float()


def matmul(x: Tensor, packed: MarlinPacked, bias: Tensor | None) -> Tensor:
    """x [rows, in] -> [rows, out]."""
    if x.shape[0] >= rows_to_unpack_at(packed.shape_for(x.shape[0]), x.device):
        return F.linear(x, unpack(packed, x.dtype), bias)
    return add_parts(matmul_parts(x, packed, bias), x.dtype)


def matmul_parts(
    x: Tensor,
    packed: MarlinPacked,
    bias: Tensor | None = None,
    sums: Tensor | None = None,
    config: LinearTile | None = None,
    rows: Tensor | None = None,
    experts: Tensor | None = None,
) -> Tensor:
    """x [rows, in] -> [parts, rows, out], whose sum over the parts is the product.

    sums           [in / block, rows] float32, x summed over each block; None: added up here
    config         None: as tuned
    rows, experts  of a weight that is many experts': [tiles * config.rows] int32, the row of x that
                   each row of the result is of, and [tiles] int32, whose weight multiplies a tile;
                   negative: not computed, and what is there means nothing
    returns        of x's type if there is one part, else float32
    """
    from qtool.kernels.cuda.device.linear import marlin_matmul

    config = config or linear_tile(packed.shape_for(x.shape[0]), x.device)
    assert x.stride(1) == 1
    assert x.shape[1] == packed.in_features
    assert packed.out_features % (STRIP * config.strips) == 0
    assert (rows is None) == (experts is None) == (packed.words.ndim == 2)
    out_rows = x.shape[0] if rows is None else rows.shape[0]
    out = x.new_empty(
        (config.split, out_rows, packed.out_features),
        dtype=x.dtype if config.split == 1 else torch.float32,
    )
    if sums is None:
        sums = block_sums(x, packed)
    tiles = -(-out_rows // config.rows) if experts is None else experts.shape[0]
    assert out_rows <= tiles * config.rows
    launch = Launch.on(x.device)
    grid = (packed.out_features // (STRIP * config.strips), config.split, tiles)
    marlin_matmul[grid](
        x,
        packed.words,
        packed.scales,
        packed.scales if packed.zeros is None else packed.zeros,
        sums,
        x if bias is None else bias,
        sums if rows is None else rows,
        sums if experts is None else experts,
        out,
        x.shape[0],
        out_rows,
        packed.out_features,
        packed.in_features,
        x.stride(0),
        BITS=packed.bits,
        BK=packed.block,
        STRIPS=config.strips,
        BM=config.rows,
        SPLIT=config.split,
        STAGES=config.stages,
        BIAS=BIASES[x.dtype],
        WHOLE_ROW=packed.whole_row,
        HAS_ZEROS=packed.zeros is not None,
        HAS_BIAS=bias is not None,
        ROUTED=experts is not None,
        ASM=launch.has_assembly,
        K_BY_THREAD=launch.inputs_by_thread,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    return out


def sum_block(packed: MarlinPacked) -> int:
    """Inputs whose sums the product reads; 0: it reads none."""
    return packed.block if packed.bits == 4 else 0


def block_sums(x: Tensor, packed: MarlinPacked) -> Tensor:
    """x [rows, in] summed over each block of inputs: [in / block, rows] float32.

    Codes of 8 bits need none, and get an empty one.
    """
    from qtool.kernels.cuda.device import linear

    rows, in_features = x.shape
    if packed.bits == 8:
        return x.new_empty((0, rows), dtype=torch.float32)
    blocks = in_features // packed.block
    sums = x.new_empty((blocks, rows), dtype=torch.float32)
    height = 16
    grid = (blocks, -(-rows // height))
    linear.block_sums[grid](
        x, sums, rows, x.stride(0), in_features, packed.block, BM=height, num_warps=4
    )
    return sums


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """[parts, rows, out] -> [rows, out], added in order."""
    from qtool.kernels.cuda.device import linear

    if parts.shape[0] == 1:
        return parts[0].to(dtype)
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    block = 1024
    grid = (-(-out.numel() // block),)
    linear.add_parts[grid](parts, out, out.numel(), SPLIT=parts.shape[0], BLOCK=block)
    return out


def unpack(packed: MarlinPacked, dtype: torch.dtype) -> Tensor:
    """The weight [out, in]."""
    from qtool.kernels.cuda.device.linear import unpack_words

    assert packed.words.ndim == 2
    out = torch.empty(
        (packed.out_features, packed.in_features), dtype=dtype, device=packed.words.device
    )
    grid = (packed.out_features // STRIP, packed.in_features // packed.block)
    unpack_words[grid](
        packed.words,
        packed.scales,
        packed.scales if packed.zeros is None else packed.zeros,
        out,
        packed.out_features,
        packed.in_features,
        BITS=packed.bits,
        BK=packed.block,
        WHOLE_ROW=packed.whole_row,
        HAS_ZEROS=packed.zeros is not None,
        num_warps=4,
    )
    return out
