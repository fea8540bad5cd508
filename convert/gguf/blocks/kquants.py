"""Q2_K .. Q6_K: super-blocks of 256 weights, scales of sub-blocks themselves quantized.

    type  sub-blocks  bytes                                               weight
    Q2_K  16 of 16    scales[16] (low nibble s, high m) qs[64] d h dmin h   d s q - dmin m
    Q3_K  16 of 16    hmask[32] qs[64] scales[12] (16 x 6 bit) d h          d (s - 32) (q - 4)
    Q4_K   8 of 32    d h dmin h scales[12] (8 x 6 + 6 bit) qs[128]         d s q - dmin m
    Q5_K   8 of 32    d h dmin h scales[12] qh[32] qs[128]                  d s q - dmin m
    Q6_K  16 of 16    ql[128] qh[64] int8 scales[16] d h                    d s (q - 32)

Each quantizer has three steps: fit every sub-block alone (search.py), quantize the sub-blocks'
scales and minima against the largest, and round the weights again on the grids as they now are.
A sub-block whose grid became 0 keeps the codes of its first fit, as in ggml-quants.c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.lanes import (
    as_byte,
    constant,
    divide,
    exact_sqrt,
    finite_inverse,
    from_half,
    half_bytes,
    lane_sum,
    signed_absmax,
    to_lanes,
)
from qtool.convert.gguf.blocks.search import (
    GROUP_MAX_EPS,
    AffineFit,
    fit_positive,
    fit_scale,
    fit_scale_and_minimum,
    fit_scale_by_descent,
)

SUPER = 256


def quantize_q2_k(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """[rows, columns] float32 (importance: [columns]) -> [rows, bytes] uint8. So are the others."""
    x = to_lanes(rows, 16)
    if importance is None:
        fit = fit_scale_and_minimum(x, 3, x.abs(), first=-0.5, step=0.1, steps=15, absolute=True)
        d, scales = _fractions(fit.scales.view(-1, 16), 15)
        dmin, minima = _fractions(fit.minima.view(-1, 16), 15)
    else:
        weights = _importance_lanes(rows, importance, 16, constant(1.0))
        fit = fit_scale_and_minimum(x, 3, weights, first=-0.9, step=0.05, steps=36)
        d, scales = _weighted_fractions(fit.scales, weights, 16, 15)
        dmin, minima = _weighted_fractions(fit.minima, weights, 16, 15)
    stored = _bytes(scales) | (_bytes(minima) << 4)
    codes = _requantize_affine(x, fit, 3, d, stored & 15, dmin, stored >> 4)
    fields = [stored, _pack_crumbs(codes), half_bytes(d), half_bytes(dmin)]
    return _rows(rows, fields)


def quantize_q3_k(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    x = to_lanes(rows, 16)
    if importance is None:
        fit = fit_scale_by_descent(x, 4)
        sub_scales = fit.scales.view(-1, 16)
        peak = signed_absmax(sub_scales.t())
        empty = peak == 0
        inverse = constant(-32.0) / torch.where(empty, 1.0, peak)
        scales = torch.round(inverse[:, None] * sub_scales).clamp_(-32, 31) + 32
        scales = scales.masked_fill(empty[:, None], 0.0)
        d = torch.where(empty, 0.0, constant(1.0) / inverse)
    else:
        weights = _importance_lanes(rows, importance, 16, constant(2.0))
        fit = fit_scale(x, 4, weights)
        block_weights = lane_sum(weights).view(-1, 16).t().contiguous()
        d, scale_lanes = fit_scale(fit.scales.view(-1, 16).t().contiguous(), 32, block_weights)
        scales = scale_lanes.t()
    grid = (d.half().float()[:, None] * (scales - 32)).reshape(-1)
    codes = _requantize_symmetric(x, fit.codes, grid, 4)
    s = _bytes(scales)
    high = (s >> 4).view(-1, 4, 4)
    packed_scales = torch.cat(
        [
            (s[:, :8] & 15) | ((s[:, 8:] & 15) << 4),
            high[:, 0] | (high[:, 1] << 2) | (high[:, 2] << 4) | (high[:, 3] << 6),
        ],
        1,
    )
    third_bits = (codes >> 2).view(-1, 8, 32)
    mask = third_bits[:, 0].clone()
    for group in range(1, 8):
        mask |= third_bits[:, group] << group
    return _rows(rows, [mask, _pack_crumbs(codes & 3), packed_scales, half_bytes(d)])


def quantize_q4_k(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    return _quantize_q4_or_q5(rows, importance, bits=4)


def quantize_q5_k(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    return _quantize_q4_or_q5(rows, importance, bits=5)


def _quantize_q4_or_q5(rows: Tensor, importance: Tensor | None, bits: int) -> Tensor:
    limit = 2**bits - 1
    x = to_lanes(rows, 32)
    if importance is None:
        weights = exact_sqrt(lane_sum(x * x) / constant(32.0)) + x.abs()
        first, steps = (-1.0, 20) if bits == 4 else (-0.5, 15)
        fit = fit_scale_and_minimum(x, limit, weights, first=first, step=0.1, steps=steps)
        d, scales = _fractions(fit.scales.view(-1, 8), 63)
        dmin, minima = _fractions(fit.minima.view(-1, 8), 63)
        scales = scales.clamp_(max=63)
    else:
        weights = _importance_lanes(rows, importance, 32, constant(2.0))
        fit = fit_scale_and_minimum(x, limit, weights, first=-0.9, step=0.05, steps=36)
        d, scales = _weighted_fractions(fit.scales, weights, 8, 63)
        dmin, minima = _weighted_fractions(fit.minima, weights, 8, 63)
        if bits == 5:  # the reference's Q4_K lets the byte of a negative scale spill
            scales = scales.clamp(max=63)
    stored = _pack_six_bit_pairs(_bytes(scales), _bytes(minima))
    stored_scales, stored_minima = _unpack_six_bit_pairs(stored)
    codes = _requantize_affine(x, fit, limit, d, stored_scales, dmin, stored_minima)
    codes = codes.view(-1, 4, 2, 32)
    fields = [half_bytes(d), half_bytes(dmin), stored]
    if bits == 5:
        high = codes >> 4
        fifth_bits = high[:, 0, 0] | (high[:, 0, 1] << 1)
        for group in range(1, 4):
            fifth_bits |= (high[:, group, 0] << 2 * group) | (high[:, group, 1] << 2 * group + 1)
        fields.append(fifth_bits)
    low = codes & 15
    fields.append((low[:, :, 0] | (low[:, :, 1] << 4)).flatten(1))
    return _rows(rows, fields)


def quantize_q6_k(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    x = to_lanes(rows, 16)
    weights = None
    if importance is not None:  # raw here, not scaled by the weights' size as in the others
        weights = to_lanes(importance.expand(rows.shape), 16)
    fit = fit_scale(x, 32, weights)
    sub_scales = fit.scales.view(-1, 16)
    peak = signed_absmax(sub_scales.t())
    empty = peak.abs() < GROUP_MAX_EPS
    inverse = constant(-128.0) / torch.where(empty, 1.0, peak)
    d = constant(1.0) / inverse
    scales = torch.round(inverse[:, None] * sub_scales).clamp_(max=127)
    grid = (d.half().float()[:, None] * scales).reshape(-1)
    codes = _requantize_symmetric(x, fit.codes, grid, 32).view(-1, 2, 4, 32)
    low, high = codes & 15, codes >> 4
    ql = torch.cat([low[:, :, 0] | (low[:, :, 2] << 4), low[:, :, 1] | (low[:, :, 3] << 4)], -1)
    qh = high[:, :, 0] | (high[:, :, 1] << 2) | (high[:, :, 2] << 4) | (high[:, :, 3] << 6)
    signed_scales = scales.to(torch.int8).view(torch.uint8)
    data = torch.cat([ql.flatten(1), qh.flatten(1), signed_scales, half_bytes(d)], 1)
    data[empty] = 0  # the reference clears the whole block, codes of zero weights included
    return data.view(rows.shape[0], -1)


def _importance_lanes(rows: Tensor, importance: Tensor, lanes: int, factor: Tensor) -> Tensor:
    """qw * sqrt(sigma2 + x**2) as [lanes, blocks]; sigma2 = factor * mean square of the
    super-block."""
    elements = rows.reshape(-1, SUPER).t().contiguous()
    squares = elements * elements
    sigma2 = factor * lane_sum(squares) / constant(float(SUPER))
    spread = exact_sqrt(sigma2 + squares).t()
    weights = importance.view(1, -1, SUPER) * spread.reshape(rows.shape[0], -1, SUPER)
    return to_lanes(weights, lanes)


def _fractions(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Sub-block scales [blocks, n] as parts of the largest: (d [blocks], codes [blocks, n]).

    Codes are 0 .. limit, and above it for a negative scale: see search.fit_positive.
    """
    largest = values.amax(1)
    largest = torch.where(largest > 0, largest, 0.0)  # not clamp, which keeps the sign of -0
    inverse = finite_inverse(divide(constant(float(limit)), largest))
    codes = as_byte(torch.round(inverse[:, None] * values))
    return largest / constant(float(limit)), codes


def _weighted_fractions(
    values: Tensor, weights: Tensor, sub_blocks: int, limit: int
) -> tuple[Tensor, Tensor]:
    """The same by search, each sub-block weighted by its elements' sum of importance."""
    block_weights = lane_sum(weights).view(-1, sub_blocks).t().contiguous()
    fit = fit_positive(values.view(-1, sub_blocks).t().contiguous(), limit, block_weights)
    return fit.scales, fit.codes.t()


def _requantize_affine(
    x: Tensor, fit: AffineFit, limit: int, d: Tensor, scales: Tensor, dmin: Tensor, minima: Tensor
) -> Tensor:
    """Codes on the stored grids, [blocks of 256, 256] uint8; scales and minima as stored, uint8."""
    grid = (d.half().float()[:, None] * scales.float()).reshape(-1)
    offset = (dmin.half().float()[:, None] * minima.float()).reshape(-1)
    unused = grid == 0
    codes = (x + offset).div_(torch.where(unused, 1.0, grid)).round_().clamp_(0, limit)
    return _choose(unused, fit.codes, codes)


def _requantize_symmetric(x: Tensor, first: Tensor, grid: Tensor, limit: int) -> Tensor:
    unused = grid == 0
    codes = (x / torch.where(unused, 1.0, grid)).round_().clamp_(-limit, limit - 1).add_(limit)
    return _choose(unused, first, codes)


def _choose(unused: Tensor, first: Tensor, codes: Tensor) -> Tensor:
    if bool(unused.any()):
        codes = torch.where(unused, first, codes)
    return codes.to(torch.uint8).t().reshape(-1, SUPER)


def _rows(rows: Tensor, fields: list[Tensor]) -> Tensor:
    return torch.cat(fields, 1).view(rows.shape[0], -1)


def _bytes(codes: Tensor) -> Tensor:
    # by way of int32: a negative float has no defined conversion to uint8
    return codes.to(torch.int32).to(torch.uint8)


def _pack_crumbs(codes: Tensor) -> Tensor:
    """[blocks, 256] of 0..3 -> [blocks, 64]: byte 32n+l holds 128n+l, +32, +64, +96, low first."""
    q = codes.view(-1, 2, 4, 32)
    packed = q[:, :, 0] | (q[:, :, 1] << 2) | (q[:, :, 2] << 4) | (q[:, :, 3] << 6)
    return packed.flatten(1)


def _unpack_crumbs(packed: Tensor) -> Tensor:
    """[..., 64] -> [..., 2, 4, 32], the inverse."""
    q = packed.reshape(*packed.shape[:-1], 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=packed.device)
    return (q >> shifts[:, None]) & 3


def _pack_six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales s and minima m of 6 bits in 12 bytes:

    byte j    (j < 4)  s[j]  with the top 2 bits of s[j+4] above it
    byte j+4           m[j]  with the top 2 bits of m[j+4]
    byte j+8           low nibble of s[j+4], low nibble of m[j+4] above it
    """
    return torch.cat(
        [
            scales[:, :4] | ((scales[:, 4:] >> 4) << 6),
            minima[:, :4] | ((minima[:, 4:] >> 4) << 6),
            (scales[:, 4:] & 15) | ((minima[:, 4:] & 15) << 4),
        ],
        1,
    )


def _unpack_six_bit_pairs(packed: Tensor) -> tuple[Tensor, Tensor]:
    """[..., 12] -> scales and minima, [..., 8] each."""
    first, second, third = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = torch.cat([first & 63, (third & 15) | ((first >> 6) << 4)], -1)
    minima = torch.cat([second & 63, (third >> 4) | ((second >> 6) << 4)], -1)
    return scales, minima


def _blocks(data: Tensor, block_bytes: int) -> Tensor:
    return data.view(data.shape[0], -1, block_bytes)


def dequantize_q2_k(data: Tensor) -> Tensor:
    """[rows, bytes] uint8 -> [rows, columns] float32. So are the others."""
    blocks = _blocks(data, 84)
    d, dmin = from_half(blocks[..., 80:82]), from_half(blocks[..., 82:84])
    scales = (d * (blocks[..., :16] & 15).float()).unsqueeze(-1)
    minima = (dmin * (blocks[..., :16] >> 4).float()).unsqueeze(-1)
    codes = _unpack_crumbs(blocks[..., 16:80]).reshape(*blocks.shape[:2], 16, 16).float()
    return (scales * codes - minima).flatten(1)


def dequantize_q3_k(data: Tensor) -> Tensor:
    blocks = _blocks(data, 110)
    packed = blocks[..., 96:108]
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=data.device)
    high = ((packed[..., None, 8:] >> shifts[:, None]) & 3).flatten(-2)
    low = torch.cat([packed[..., :8] & 15, packed[..., :8] >> 4], -1)
    scales = (low | (high << 4)).float() - 32
    bits = torch.arange(8, dtype=torch.uint8, device=data.device)
    third = ((blocks[..., None, :32] >> bits[:, None]) & 1).flatten(-2)
    codes = _unpack_crumbs(blocks[..., 32:96]).flatten(-3) | (third << 2)
    values = codes.reshape(*blocks.shape[:2], 16, 16).float() - 4
    return ((from_half(blocks[..., 108:110]) * scales).unsqueeze(-1) * values).flatten(1)


def _dequantize_q4_or_q5(blocks: Tensor, codes: Tensor) -> Tensor:
    """blocks [rows, blocks, bytes]; codes [rows, blocks, 8, 32]."""
    scales, minima = _unpack_six_bit_pairs(blocks[..., 4:16])
    scale = (from_half(blocks[..., 0:2]) * scales.float()).unsqueeze(-1)
    minimum = (from_half(blocks[..., 2:4]) * minima.float()).unsqueeze(-1)
    return (scale * codes.float() - minimum).flatten(1)


def _unpack_nibble_pairs(packed: Tensor) -> Tensor:
    """[..., 128] -> [..., 8, 32]: each 32 bytes hold two sub-blocks, low nibbles first."""
    q = packed.reshape(*packed.shape[:-1], 4, 1, 32)
    return torch.cat([q & 15, q >> 4], -2).flatten(-3, -2)


def dequantize_q4_k(data: Tensor) -> Tensor:
    blocks = _blocks(data, 144)
    return _dequantize_q4_or_q5(blocks, _unpack_nibble_pairs(blocks[..., 16:]))


def dequantize_q5_k(data: Tensor) -> Tensor:
    blocks = _blocks(data, 176)
    bits = torch.arange(8, dtype=torch.uint8, device=data.device)
    fifth = ((blocks[..., None, 16:48] >> bits[:, None]) & 1) << 4
    return _dequantize_q4_or_q5(blocks, _unpack_nibble_pairs(blocks[..., 48:]) | fifth)


def dequantize_q6_k(data: Tensor) -> Tensor:
    blocks = _blocks(data, 210)
    ql = blocks[..., :128].reshape(*blocks.shape[:2], 2, 2, 32)
    low = torch.cat([ql & 15, ql >> 4], -2)
    codes = low | (_unpack_crumbs(blocks[..., 128:192]) << 4)
    values = codes.reshape(*blocks.shape[:2], 16, 16).float() - 32
    scales = blocks[..., 192:208].contiguous().view(torch.int8).float()
    return ((from_half(blocks[..., 208:210]) * scales).unsqueeze(-1) * values).flatten(1)
