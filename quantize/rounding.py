"""Weights as small floats or places in a table, by rounding alone: no data, a tensor at a time.

    fp8     e4m3, one scale a row or a block of 128 x 128: amax / 448
    nvfp4   e2m1 in groups of 16; a group's scale is an e4m3 float by one float32 for the matrix
    mxfp4   e2m1 in groups of 32 with a power of two for a scale
    nf4     bitsandbytes' table for normally distributed weights, blocks of 64, scale amax
    codebook4, 3, 2  the best table for each row (tables.py)

A group of e2m1 has a choice that costs nothing: its largest weight may lie on 6 or, on a finer
grid of scales, on 4 (MXFP4: the power of two below or above). Both are rounded and the one with
less squared error is kept.

Sources: compressed-tensors compressors/nvfp4 and mxfp4, OCP Microscaling Formats 1.0,
bitsandbytes functional.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.float4 import E2M1, MXFP4, NVFP4
from qtool.errors import UsageError
from qtool.quantize.tables import best_tables, nearest
from qtool.scheme import FloatScheme
from qtool.weights import CodebookWeight, Float8Weight, TableWeight

FLOAT8_LARGEST = 448.0
_SMALLEST_SCALE = 2.0**-100
# bitsandbytes' NF4 (create_normal_map), in the order of its codes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip


def round_float(weight: Tensor, scheme: FloatScheme) -> Float8Weight | CodebookWeight | TableWeight:
    """weight [out, in] float32, finite."""
    if scheme.name == "fp8":
        return _fp8(weight, scheme)
    if scheme.name == NVFP4:
        return _nvfp4(weight, scheme)
    if scheme.name == MXFP4:
        return _mxfp4(weight, scheme)
    if scheme.name == "nf4":
        return _nf4(weight, scheme)
    if scheme.table_bits is not None:
        tables = best_tables(weight, weight.new_ones(weight.shape[1]), 2**scheme.table_bits)
        return TableWeight(nearest(weight, tables), tables, scheme)
    raise UsageError(f"{scheme} is not written", "written: fp8, nvfp4, mxfp4, nf4, codebook")


def _fp8(weight: Tensor, scheme: FloatScheme) -> Float8Weight:
    rows, columns = scheme.block
    out_features, in_features = weight.shape
    height, width = rows or out_features, columns or in_features
    down, across = -(-out_features // height), -(-in_features // width)
    padded = weight.new_zeros(down * height, across * width)
    padded[:out_features, :in_features] = weight.abs()
    largest = padded.view(down, height, across, width).amax((1, 3))
    # bfloat16, so that files of the model's own type hold them exactly.
    scales = (largest / FLOAT8_LARGEST).clamp(min=_SMALLEST_SCALE).to(torch.bfloat16).float()
    each = scales.repeat_interleave(height, 0).repeat_interleave(width, 1)
    scaled = weight / each[:out_features, :in_features]
    values = scaled.clamp(-FLOAT8_LARGEST, FLOAT8_LARGEST).to(torch.float8_e4m3fn)
    return Float8Weight(values, scales, scheme)


def _nvfp4(weight: Tensor, scheme: FloatScheme) -> CodebookWeight:
    groups = _groups(weight, scheme)
    largest = groups.abs().amax(-1)
    overall = nvfp4_factor(largest.max() / E2M1[-1])
    candidates = []
    for top in (6.0, 4.0):
        stored = (largest / top * overall).clamp(2.0**-9, FLOAT8_LARGEST)
        candidates.append(stored.to(torch.float8_e4m3fn).float() / overall)
    return _best_e2m1(weight, groups, candidates, scheme)


def nvfp4_factor(largest_scale: Tensor) -> Tensor:
    """What the scales of a matrix are multiplied by to be stored: the power of two that puts the
    largest between 224 and 448. Any factor will do that wastes no range; this one divides exactly,
    and is found again from the scales themselves.
    """
    return torch.exp2(torch.floor(torch.log2(FLOAT8_LARGEST / largest_scale.clamp(min=2.0**-100))))


def _mxfp4(weight: Tensor, scheme: FloatScheme) -> CodebookWeight:
    groups = _groups(weight, scheme)
    largest = groups.abs().amax(-1).clamp(min=_SMALLEST_SCALE)
    # 4 is the largest power of two among the values.
    below = torch.exp2(torch.floor(torch.log2(largest)) - 2)
    return _best_e2m1(weight, groups, [below, 2 * below], scheme)


def _best_e2m1(
    weight: Tensor, groups: Tensor, candidates: list[Tensor], scheme: FloatScheme
) -> CodebookWeight:
    """candidates  scales [out, groups]"""
    table = torch.tensor([*E2M1, *(-value for value in E2M1)], device=weight.device)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for scales in candidates:
        scaled = groups / scales.unsqueeze(-1)
        codes = nearest_e2m1(scaled)
        error = (table[codes.int()] * scales.unsqueeze(-1) - groups).square().sum(-1)
        if best is None:
            best = codes, scales, error
        else:
            better = error < best[2]
            best = (
                torch.where(better.unsqueeze(-1), codes, best[0]),
                torch.where(better, scales, best[1]),
                torch.where(better, error, best[2]),
            )
    assert best is not None
    codes, scales, _ = best
    return CodebookWeight(codes.view(weight.shape), table, scales.flatten(), scheme, scale_bits=8)


def nearest_e2m1(values: Tensor) -> Tensor:
    """Codes uint8, ties to the even code as hardware rounds."""
    steps = torch.tensor(E2M1, device=values.device)
    bounds = (steps[1:] + steps[:-1]) / 2
    magnitude = values.abs()
    low = torch.bucketize(magnitude, bounds)  # ties go down
    high = torch.bucketize(magnitude, bounds, right=True)  # ties go up
    codes = torch.where(low % 2 == 0, low, high)
    return torch.where(torch.signbit(values) & (codes > 0), codes + 8, codes).to(torch.uint8)


def _nf4(weight: Tensor, scheme: FloatScheme) -> CodebookWeight:
    block = scheme.block[1]
    assert block is not None
    flat = weight.flatten()
    count = -(-flat.numel() // block)
    padded = torch.nn.functional.pad(flat, (0, count * block - flat.numel())).view(count, block)
    scales = padded.abs().amax(-1)
    table = torch.tensor(NF4, device=weight.device)
    scaled = padded / scales.clamp(min=_SMALLEST_SCALE).unsqueeze(-1)
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2).to(torch.uint8)
    codes = codes.flatten()[: flat.numel()].view(weight.shape)
    return CodebookWeight(codes, table, scales, scheme)


def _groups(weight: Tensor, scheme: FloatScheme) -> Tensor:
    """[out, groups, width]"""
    width = scheme.block[1]
    assert width is not None
    return weight.reshape(weight.shape[0], -1, width)
