"""What every solver returns, and the error by which solvers are compared."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool import grid
from qtool.grid import Grid
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight


class Solution(NamedTuple):
    """weight       what is stored
    dequantized  [out, in] float32, exactly what the stored weight decodes to
    notes        decisions that were not the plain path, for the report
    """

    weight: QuantizedWeight
    dequantized: Tensor
    notes: tuple[str, ...] = ()


def from_codes(codes: Tensor, found: Grid, scheme: QuantScheme, notes: tuple[str, ...]) -> Solution:
    """A solution from codes [out, in] uint8 on a grid."""
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    weight = QuantizedWeight(codes, found.scales, zeros, scheme)
    return Solution(weight, weight.dequantize(), notes)


def round_to(
    weight: Tensor, found: Grid, scheme: QuantScheme, notes: tuple[str, ...] = ()
) -> Solution:
    """Round weight [out, in] float32 to the nearest point of a grid."""
    return from_codes(grid.codes(weight, found, scheme), found, scheme, notes)


def row_errors(weight: Tensor, dequantized: Tensor, hessian: Tensor | None) -> Tensor:
    """What each output row loses, d H dᵀ with d = weight - dequantized.

    weight, dequantized  [out, in] float32
    hessian              [in, in] float32, or None for the identity
    returns              [out] float32
    """
    difference = weight - dequantized
    if hessian is None:
        return difference.square().sum(1)
    return ((difference @ hessian) * difference).sum(1)


def relative_error(weight: Tensor, dequantized: Tensor, hessian: Tensor | None) -> float:
    """tr(d H dᵀ) / tr(W H Wᵀ): the share of the layer's output power that is lost."""
    lost = row_errors(weight, dequantized, hessian).double().sum()
    power = row_errors(weight, torch.zeros_like(weight), hessian).double().sum()
    return float(lost / power) if power > 0 else float(lost)
