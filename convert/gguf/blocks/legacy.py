"""Q4_0, Q4_1, Q5_0, Q5_1, Q8_0: 32 weights, one half-precision scale, perhaps a minimum.

    type   bytes                                         weight
    Q4_0   d h | qs[16]                                  d (q - 8)
    Q4_1   d h | m h | qs[16]                            d q + m
    Q5_0   d h | qh u32 (bit j: fifth bit of j) | qs[16]     d (q - 16)
    Q5_1   d h | m h | qh u32 | qs[16]                   d q + m
    Q8_0   d h | int8 q[32]                              d q

qs: byte j holds element j in its low nibble and element j+16 in its high one.
Without importance these follow quantize_row_*_ref of ggml-quants.c, with it quantize_row_*_impl.

A symmetric int4 weight whose groups are whole blocks is Q4_0 already: same codes around 8, the
group's scale repeated for each block. `pack_q4_0` keeps every weight as it was. An asymmetric one
is Q4_1 but for the minimum, -zero * scale, which half precision rounds. In the root mean square
that is 5e-5 to 9e-5 of normal weights where bfloat16 holds the scales (as in what `qtool quantize`
writes), 2.4e-4 of weights with any codes and zero points, and 3.6e-4 of normal weights with any
half-precision scale; four bits lose 0.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.lanes import (
    constant,
    divide,
    exact_sqrt,
    finite_inverse,
    from_half,
    half_bytes,
    lane_sum,
    lowest,
    round_away,
    signed_absmax,
    to_lanes,
)
from qtool.convert.gguf.blocks.search import fit_scale, fit_scale_and_minimum
from qtool.errors import FormatError
from qtool.scheme import QuantScheme
from qtool.weights import BlockWeight, QuantizedWeight

BLOCK = 32


def quantize_q4_0(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """[rows, columns] float32 (importance: [columns]) -> [rows, bytes] uint8. So are the others."""
    scales, codes = _symmetric(rows, importance, bits=4)
    return _rows(rows, [half_bytes(scales), _pack_nibbles(codes)])


def quantize_q5_0(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    scales, codes = _symmetric(rows, importance, bits=5)
    return _rows(rows, [half_bytes(scales), _pack_fifth_bits(codes), _pack_nibbles(codes)])


def quantize_q4_1(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    scales, offsets, codes = _affine(rows, importance, bits=4)
    return _rows(rows, [half_bytes(scales), half_bytes(offsets), _pack_nibbles(codes)])


def quantize_q5_1(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    scales, offsets, codes = _affine(rows, importance, bits=5)
    return _rows(
        rows,
        [half_bytes(scales), half_bytes(offsets), _pack_fifth_bits(codes), _pack_nibbles(codes)],
    )


def quantize_q8_0(rows: Tensor, importance: Tensor | None = None) -> Tensor:
    """Plain rounding; the reference ignores importance here."""
    x = to_lanes(rows, BLOCK)
    scales = x.abs().amax(0) / constant(127.0)
    codes = round_away(x * finite_inverse(divide(constant(1.0), scales)))
    return _rows(
        rows, [half_bytes(scales), codes.to(torch.int8).t().contiguous().view(torch.uint8)]
    )


def _symmetric(rows: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, Tensor]:
    """scales [blocks], codes [32, blocks] uint8. The scale is that of the signed peak, so that the
    peak gets the one extra negative code; codes come from the scale as it is before it is rounded
    to half precision."""
    limit = 2 ** (bits - 1)
    x = to_lanes(rows, BLOCK)
    if importance is not None:
        fit = fit_scale(x, limit, _importance_lanes(rows, importance))
        return fit.scales, fit.codes.to(torch.uint8)
    scales = signed_absmax(x) / constant(-float(limit))
    inverse = divide(constant(1.0), scales)
    codes = (x * inverse).add_(limit + 0.5).trunc_().clamp_(max=2 * limit - 1)
    overflowed = inverse.isinf()
    if bool(overflowed.any()):
        codes.masked_fill_(overflowed, 0.0)  # see finite_inverse: 0, not the middle
    return scales, codes.to(torch.uint8)


def _affine(rows: Tensor, importance: Tensor | None, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """scales and offsets [blocks], codes [32, blocks] uint8: weight = scale * code + offset."""
    limit = 2**bits - 1
    x = to_lanes(rows, BLOCK)
    if importance is not None:
        weights = _importance_lanes(rows, importance)
        fit = fit_scale_and_minimum(x, limit, weights, first=-0.9, step=0.05, steps=36)
        return fit.scales, -fit.minima, fit.codes.to(torch.uint8)
    offsets = lowest(x)
    scales = (x.amax(0) - offsets) / constant(float(limit)) + 0.0  # never -0
    inverse = finite_inverse(divide(constant(1.0), scales))
    codes = ((x - offsets) * inverse).add_(0.5).trunc_().clamp_(max=limit)
    return scales, offsets, codes.to(torch.uint8)


def _importance_lanes(rows: Tensor, importance: Tensor) -> Tensor:
    """qw * sqrt(sigma2 + x**2) as [32, blocks]; sigma2 is the row's mean square, added left to
    right over the whole row as the reference does."""
    columns = rows.t().contiguous()
    squares = columns * columns
    sigma2 = lane_sum(squares) / constant(float(rows.shape[1]))
    weights = importance[:, None] * exact_sqrt(sigma2 + squares)
    return to_lanes(weights.t(), BLOCK)


def _rows(rows: Tensor, fields: list[Tensor]) -> Tensor:
    """Fields [blocks, bytes] side by side, as rows of blocks."""
    return torch.cat(fields, 1).view(rows.shape[0], -1)


def _pack_nibbles(codes: Tensor) -> Tensor:
    """[32, blocks] uint8 -> [blocks, 16]: elements j and j+16 in byte j."""
    low = codes & 15
    return (low[:16] | (low[16:] << 4)).t().contiguous()


def _unpack_nibbles(packed: Tensor) -> Tensor:
    """[..., 16] -> [..., 32], the inverse."""
    return torch.cat([packed & 15, packed >> 4], -1)


def _pack_fifth_bits(codes: Tensor) -> Tensor:
    """[32, blocks] uint8 -> [blocks, 4]: bit j of a little-endian u32 is bit 4 of element j."""
    bits = (codes >> 4).view(4, 8, -1)
    packed = bits[:, 0].clone()
    for bit in range(1, 8):
        packed |= bits[:, bit] << bit
    return packed.t().contiguous()


def _unpack_fifth_bits(packed: Tensor) -> Tensor:
    """[..., 4] -> [..., 32], as 0 or 16."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed.unsqueeze(-1) >> shifts) & 1).flatten(-2) << 4


def _blocks(data: Tensor, block_bytes: int) -> Tensor:
    return data.view(data.shape[0], -1, block_bytes)


def dequantize_q4_0(data: Tensor) -> Tensor:
    """[rows, bytes] uint8 -> [rows, columns] float32. So are the others."""
    blocks = _blocks(data, 18)
    codes = _unpack_nibbles(blocks[..., 2:]).float() - 8
    return (from_half(blocks[..., :2]) * codes).flatten(1)


def dequantize_q4_1(data: Tensor) -> Tensor:
    blocks = _blocks(data, 20)
    codes = _unpack_nibbles(blocks[..., 4:]).float()
    return (from_half(blocks[..., :2]) * codes + from_half(blocks[..., 2:4])).flatten(1)


def dequantize_q5_0(data: Tensor) -> Tensor:
    blocks = _blocks(data, 22)
    codes = _unpack_nibbles(blocks[..., 6:]) | _unpack_fifth_bits(blocks[..., 2:6])
    return (from_half(blocks[..., :2]) * (codes.float() - 16)).flatten(1)


def dequantize_q5_1(data: Tensor) -> Tensor:
    blocks = _blocks(data, 24)
    codes = (_unpack_nibbles(blocks[..., 8:]) | _unpack_fifth_bits(blocks[..., 4:8])).float()
    return (from_half(blocks[..., :2]) * codes + from_half(blocks[..., 2:4])).flatten(1)


def dequantize_q8_0(data: Tensor) -> Tensor:
    blocks = _blocks(data, 34)
    codes = blocks[..., 2:].contiguous().view(torch.int8)
    return (from_half(blocks[..., :2]) * codes.float()).flatten(1)


# The block type that has the codes of an integer weight: (bits, symmetric) -> type. Fewer bits than
# a type has are held by it exactly too.
REPACKED = {
    **dict.fromkeys([(2, True), (3, True), (4, True)], "Q4_0"),
    **dict.fromkeys([(2, False), (3, False), (4, False)], "Q4_1"),
    **dict.fromkeys([(5, True), (6, True), (7, True), (8, True)], "Q8_0"),
}


def repack_type(scheme: QuantScheme, columns: int) -> str | None:
    """The block type whose codes an integer weight has already, or None where there is none."""
    if scheme.group_width(columns) % BLOCK:
        return None
    return REPACKED.get((scheme.bits, scheme.symmetric))


def pack_q4_0(weight: QuantizedWeight, *, max_scale_error: float = 0.0) -> Tensor:
    """Symmetric int4, or less, to Q4_0 bytes [out, row_bytes]: the same codes, the same scales.

    Raises FormatError for other schemes, and where half precision changes a scale by more than
    `max_scale_error` of it: by default every weight stays exactly what it was.
    """
    scales = half_bytes(_block_scales(weight, "Q4_0", max_scale_error))
    weight = weight.widened(4)
    return _rows(weight.codes, [scales, _pack_nibbles(weight.codes.reshape(-1, BLOCK).t())])


def pack_q8_0(weight: QuantizedWeight, *, max_scale_error: float = 0.0) -> Tensor:
    """Symmetric int5 to int8 to Q8_0 bytes, likewise. Codes around 128 become signed bytes."""
    scales = half_bytes(_block_scales(weight, "Q8_0", max_scale_error))
    weight = weight.widened(8)
    return _rows(weight.codes, [scales, weight.codes.reshape(-1, BLOCK) ^ 128])


def pack_q4_1(weight: QuantizedWeight, *, max_scale_error: float = 0.0) -> Tensor:
    """Asymmetric int4, or less, to Q4_1 bytes: the same codes, minima rounded to half.

    A block's scale may move to a half beside it where that makes good for its minimum's rounding:
    what counts is the squared error of the block's weights. A minimum that half precision cannot
    hold comes out infinite and is refused.
    """
    scales = _block_scales(weight, "Q4_1", max_scale_error)
    assert weight.zeros is not None
    repeats = weight.scheme.group_width(weight.shape[1]) // BLOCK

    def each_block(values: Tensor) -> Tensor:
        return values.repeat_interleave(repeats, 1).flatten().double()

    exact = each_block(weight.scales)
    wanted = -each_block(weight.zeros) * exact
    if not bool(wanted.half().isfinite().all()):
        raise FormatError(f"half precision has no minimum of {float(wanted.abs().max()):g}")
    codes = weight.codes.reshape(-1, BLOCK)
    values = codes.double()
    mean, mean_square = values.mean(1), values.square().mean(1)
    best = torch.full_like(exact, torch.inf)
    found, minima = scales, wanted.half()
    for step in (0, -1, 1):  # of equals the scale as it is
        beside = (scales.view(torch.int16) + step).view(torch.float16)
        moved = beside.double() - exact
        minimum = (wanted - moved * mean).half()
        rounded = minimum.double() - wanted
        error = moved.square() * mean_square + 2 * moved * rounded * mean + rounded.square()
        better = error < best  # never where a number beside is infinite or NaN
        best = torch.where(better, error, best)
        found = torch.where(better, beside, found)
        minima = torch.where(better, minimum, minima)
    parts = [half_bytes(found.float()), half_bytes(minima.float()), _pack_nibbles(codes.t())]
    return _rows(weight.codes, parts)


def half_scale_error(weight: QuantizedWeight) -> float:
    """The largest change of a scale, as a part of it, when stored in half precision."""
    exact = weight.scales.double()
    change = (exact.half().double() - exact).abs()
    return float((change / exact.abs().clamp(min=1e-300)).max())


def _block_scales(weight: QuantizedWeight, type: str, max_scale_error: float) -> Tensor:
    """One half-precision scale a block, [blocks]."""
    columns = weight.shape[1]
    if repack_type(weight.scheme, columns) != type:
        scheme, kinds = weight.scheme, [kind for kind, name in REPACKED.items() if name == type]
        zeros = {True: "without zero points", False: "with zero points"}
        raise FormatError(
            f"{scheme} cannot be repacked as {type}: it has {scheme.bits} bits "
            f"{zeros[scheme.symmetric]} in groups of {scheme.group_width(columns)}; {type} takes "
            f"{kinds[0][0]} to {kinds[-1][0]} {zeros[kinds[0][1]]} in blocks of {BLOCK}"
        )
    error = half_scale_error(weight)
    if error > max_scale_error:
        raise FormatError(
            f"half precision, which {type} has, changes a scale by {error:.2g} of it, "
            f"and {max_scale_error:.2g} was allowed"
        )
    repeats = weight.scheme.group_width(columns) // BLOCK
    return weight.scales.half().repeat_interleave(repeats, 1).flatten()


def unpack_q4_0(weight: BlockWeight) -> QuantizedWeight:
    """Q4_0 bytes as symmetric int4 in groups of 32, exactly."""
    assert weight.codec.name == "Q4_0", weight.codec.name
    blocks = _blocks(weight.data, 18)
    codes = _unpack_nibbles(blocks[..., 2:]).flatten(1)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    return QuantizedWeight(codes, scales, None, QuantScheme(4, BLOCK))


def unpack_q8_0(weight: BlockWeight) -> QuantizedWeight:
    """Q8_0 bytes as symmetric int8 in groups of 32, exactly."""
    assert weight.codec.name == "Q8_0", weight.codec.name
    blocks = _blocks(weight.data, 34)
    scales = blocks[..., :2].contiguous().view(torch.float16)[..., 0]
    return QuantizedWeight(blocks[..., 2:].flatten(1) ^ 128, scales, None, QuantScheme(8, BLOCK))
