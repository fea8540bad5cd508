"""IQ4_NL and IQ4_XS: 4-bit codes into a fixed table that is dense near zero.

    IQ4_NL  32 weights   d h | qs[16]                                  d table[q]
    IQ4_XS  256 weights  d h | scales_h u16 | scales_l[4] | qs[128]    d (s - 32) table[q], 8 x 32

qs: in each 16 bytes, byte j holds element j in its low nibble and j+16 in its high one. The 6-bit
scale of sub-block i is nibble i%2 of scales_l[i/2] and bits 2i, 2i+1 of scales_h.
One search serves with and without importance (quantize_row_iq4_nl_impl of ggml-quants.c).
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.lanes import (
    LaneSums,
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
from qtool.convert.gguf.blocks.search import GROUP_MAX_EPS

VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TABLE = torch.tensor(VALUES, dtype=torch.float32)
# The nearest entry, ties upwards, is the number of midpoints that x reaches: near each midpoint
# both distances are exact in float32, so comparing x with it decides as comparing them does. All
# midpoints are multiples of a half, so floor(2x) decides too: a table of 481 entries, 20 times
# faster than a binary search (2026-11, Zen 5, one thread).
_LOWEST, _HIGHEST = 2 * VALUES[0], 2 * VALUES[-1]
_MIDPOINTS = (_TABLE[1:] + _TABLE[:-1]) / 2
_CODE_OF_HALVES = torch.bucketize(
    torch.arange(_LOWEST, _HIGHEST + 1) / 2, _MIDPOINTS, right=True
).to(torch.uint8)
_VALUE_OF_HALVES = _TABLE[_CODE_OF_HALVES.int()]
_TRIES = 7


def quantize_iq4_nl(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """[rows, columns] float32 (importance: [columns]) -> [rows, bytes] uint8."""
    x = to_lanes(rows, 32)
    scales = _fit(x, _weights(rows, x, importance, 32))
    codes = _nearest(finite_inverse(divide(constant(1.0), scales)) * x, _CODE_OF_HALVES)
    return torch.cat([half_bytes(scales), _pack(codes)], 1).view(rows.shape[0], -1)


def quantize_iq4_xs(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    x = to_lanes(rows, 32)
    scales = _fit(x, _weights(rows, x, importance, 256)).view(-1, 8)
    d = -signed_absmax(scales.t()) / constant(32.0)
    inverse = finite_inverse(divide(constant(1.0), d))[:, None]
    steps = torch.round(inverse * scales).clamp_(-32, 31)
    # the grid of d as it is, not as half precision will store it: so the reference
    grid = (d[:, None] * steps).reshape(-1)
    codes = _nearest(finite_inverse(divide(constant(1.0), grid)) * x, _CODE_OF_HALVES)
    s = (steps + 32).to(torch.int32)
    high = sum(((s[:, i] >> 4) << 2 * i for i in range(8)), torch.zeros_like(s[:, 0]))
    low = s & 15
    head = [
        half_bytes(d),
        torch.stack([high & 255, high >> 8], 1).to(torch.uint8),
        (low[:, 0::2] | (low[:, 1::2] << 4)).to(torch.uint8),
    ]
    packed = _pack(codes).view(-1, 128)
    return torch.cat([*head, packed], 1).view(rows.shape[0], -1)


def _weights(rows: Tensor, x: Tensor, importance: Tensor | None, block: int) -> Tensor:
    if importance is None:
        return x * x
    elements = rows.reshape(-1, block).t().contiguous()
    squares = elements * elements
    sigma2 = lane_sum(squares) * constant(2.0 / block)
    spread = exact_sqrt(sigma2 + squares).t().reshape(rows.shape)
    return to_lanes(importance * spread, 32)


def _fit(x: Tensor, weights: Tensor) -> Tensor:
    """The scale of each block of 32 that explains most of it, of 16 tries; [blocks]."""
    lanes, blocks = x.shape
    peak = signed_absmax(x)
    empty = peak.abs() < GROUP_MAX_EPS
    safe_peak = torch.where(empty, 1.0, peak)
    sums = LaneSums(lanes, 2, blocks)
    weighted = torch.empty_like(x)

    def evaluate(inverse: Tensor) -> tuple[Tensor, Tensor]:
        values = _nearest(inverse * x, _VALUE_OF_HALVES)
        torch.mul(weights, values, out=weighted)
        torch.mul(weighted, x, out=sums.terms[:, 0])
        torch.mul(weighted, values, out=sums.terms[:, 1])
        sum_qx, sum_q2 = sums.total().clone()
        return sum_qx, sum_q2

    first = -safe_peak / constant(float(VALUES[0]))
    sum_qx, sum_q2 = evaluate(constant(1.0) / first)
    scales = torch.where(sum_q2 > 0, divide(sum_qx, sum_q2), 0.0)
    best = scales * sum_qx
    for step in range(-_TRIES, _TRIES + 1):
        sum_qx, sum_q2 = evaluate(constant(float(step + VALUES[0])) / safe_peak)
        better = (sum_q2 > 0) & (sum_qx * sum_qx > best * sum_q2)
        scales = torch.where(better, divide(sum_qx, sum_q2), scales)
        best = torch.where(better, scales * sum_qx, best)
    return scales.masked_fill(empty, 0.0)


def _nearest(x: Tensor, table: Tensor) -> Tensor:
    """The code, or the value, of the nearest table entry; `x` is overwritten."""
    halves = x.mul_(2).floor_().clamp_(_LOWEST, _HIGHEST).sub_(_LOWEST).to(torch.int32)
    return table.index_select(0, halves.view(-1)).view(x.shape)


def _pack(q: Tensor) -> Tensor:
    """[32, blocks] uint8 -> [blocks, 16]."""
    return (q[:16] | (q[16:] << 4)).t().contiguous()


def _unpack(packed: Tensor) -> Tensor:
    """[..., 16] -> table values [..., 32]."""
    codes = torch.cat([packed & 15, packed >> 4], -1)
    return _TABLE.to(packed.device)[codes.int()]


def dequantize_iq4_nl(data: Tensor) -> Tensor:
    """[rows, bytes] uint8 -> [rows, columns] float32."""
    blocks = data.view(data.shape[0], -1, 18)
    return (from_half(blocks[..., :2]) * _unpack(blocks[..., 2:])).flatten(1)


def dequantize_iq4_xs(data: Tensor) -> Tensor:
    blocks = data.view(data.shape[0], -1, 136)
    low = torch.stack([blocks[..., 4:8] & 15, blocks[..., 4:8] >> 4], -1).flatten(-2)
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8, device=data.device)
    high = ((blocks[..., 2:4, None] >> shifts) & 3).flatten(-2)
    scales = (low | (high << 4)).float() - 32
    values = _unpack(blocks[..., 8:].reshape(*blocks.shape[:2], 8, 16))
    return ((from_half(blocks[..., :2]) * scales).unsqueeze(-1) * values).flatten(1)
