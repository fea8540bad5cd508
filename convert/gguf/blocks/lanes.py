"""Exact float32 arithmetic for block quantizers, vectorised over blocks.

The reference (ggml-quants.c, x86-64 baseline build: no fused multiply-add) sums the 16 or 32
weights of a block from left to right. Bits agree only if ours do too, so the searches work on
tensors laid out lane-major, [lanes, blocks]: lane k of every block is one contiguous row, a
reduction is a loop over lanes, and each step of it is one vector operation over all blocks.

What keeps the bits equal, each found by comparing with the reference:

* `torch.sum` adds in an order of its own: `LaneSums` adds lanes in order, beginning with 0.
* `torch.sqrt` on float32 may use a vector library that is not correctly rounded: `exact_sqrt`
  goes through float64.
* `number / tensor` is computed as `number * (1 / tensor)`, two roundings: `constant` makes the
  number a tensor, and tensor / tensor rounds once.
* no `addcmul`, no compilation: both may contract a product and a sum into one rounding.
* `torch.round` rounds halves to even, as ggml's nearest_int; `round_away` is C's roundf.
"""

from __future__ import annotations

import torch
from torch import Tensor


def constant(value: float) -> Tensor:
    return torch.tensor(value, dtype=torch.float32)


def to_lanes(rows: Tensor, lanes: int) -> Tensor:
    """[rows, columns] -> [lanes, blocks]: block b holds elements b*lanes .. b*lanes+lanes-1."""
    return rows.reshape(-1, lanes).t().contiguous()


class LaneSums:
    """`count` reductions over lanes at once, each added left to right.

    Fill `terms` [lanes, count, blocks], then `total()` is [count, blocks]. One buffer serves a
    whole search: allocation, and indexing from Python, cost as much as the additions.
    """

    def __init__(self, lanes: int, count: int, blocks: int) -> None:
        self.terms = torch.empty(lanes, count, blocks)
        self._lanes = self.terms.unbind(0)
        self._total = torch.empty(count, blocks)

    def total(self) -> Tensor:
        total = self._total
        torch.add(self._lanes[0], 0.0, out=total)
        for lane in self._lanes[1:]:
            total.add_(lane)
        return total


def lane_sum(terms: Tensor) -> Tensor:
    """[lanes, blocks] -> [blocks], lanes added left to right from 0."""
    total = terms[0] + 0.0
    for lane in terms[1:]:
        total += lane
    return total


def exact_sqrt(x: Tensor) -> Tensor:
    return x.double().sqrt().float()


def round_away(x: Tensor) -> Tensor:
    """C's roundf: halves away from zero. floor(|x|) and the fraction are exact, |x| + .5 is not."""
    size = x.abs()
    whole = size.floor()
    return torch.copysign(whole + (size - whole >= 0.5), x)


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator, and 0 where the denominator is 0."""
    zero = denominator == 0
    return torch.where(zero, 0.0, numerator / torch.where(zero, 1.0, denominator))


def finite_inverse(inverse: Tensor) -> Tensor:
    """An inverse scale, and 0 where it overflowed: there the reference's conversion of infinities
    to integers gives code 0 throughout. Such scales are below 1e-36, and 0 in half precision.
    NaN, the scale of weights whose squares overflow, becomes 0 too: no block keeps it."""
    return torch.where(inverse.isfinite(), inverse, 0.0)


def as_byte(codes: Tensor) -> Tensor:
    """Whole numbers modulo 256: what is left of a negative one in the reference's uint8_t."""
    return torch.remainder(codes, 256.0)


def signed_absmax(x: Tensor) -> Tensor:
    """[lanes, blocks] -> [blocks]: the element of largest magnitude with its sign, the first of
    equals; never -0."""
    lowest, highest = x.amin(0), x.amax(0)
    peak = torch.where(-lowest > highest, lowest, highest)
    tied = (-lowest == highest).nonzero()[:, 0]
    if tied.numel():
        some = x[:, tied]
        # argmax of a boolean gives the first True on the CPU; elsewhere ties are anyone's.
        first = (some.abs() == highest[tied]).to(torch.uint8).argmax(0, keepdim=True)
        peak[tied] = some.gather(0, first)[0] + 0.0  # -0 becomes 0
    return peak


def lowest(x: Tensor) -> Tensor:
    """[lanes, blocks] -> [blocks]: the smallest element. Of 0 and -0, which are equal, the first:
    the reference scans with <, and the sign of a zero minimum reaches the file."""
    least = x.amin(0)
    zero = (least == 0).nonzero()[:, 0]
    if zero.numel():
        some = x[:, zero]
        first = (some == 0).to(torch.uint8).argmax(0, keepdim=True)
        least[zero] = some.gather(0, first)[0]
    return least


def half_bytes(values: Tensor) -> Tensor:
    """[blocks] float32 -> [blocks, 2] uint8, IEEE half, little-endian."""
    return values.half().view(-1, 1).view(torch.uint8)


def from_half(data: Tensor) -> Tensor:
    """[..., 2] uint8 -> [..., 1] float32."""
    return data.contiguous().view(torch.float16).float()
