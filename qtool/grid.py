"""All affine integer rounding: fit a grid, choose codes, dequantize.

A grid gives each group of a row a scale s and a zero z (the midpoint where the scheme is
symmetric):

    code   = clamp(round(w / s) + z, 0, 2**bits - 1)
    weight = (code - z) * s

Scales are rounded to bfloat16 before any code is chosen. bfloat16's 8 significant bits fit in
float16's 11, so files that store float16 and files that store bfloat16 scales carry the same
weights, as long as |s| >= 2**-14 (float16's smallest normal number), which ``round_scales``
guarantees.

Symmetric absmax uses the full range: the signed scale puts the weight of largest magnitude
exactly on code 0, that is on -2**(bits-1), the one value that a two's complement grid has more on
its negative side.

Worked example, 4 bit, one group [1.0, -0.5, 0.25]: the extreme is 1.0, s = 1.0 / -8 = -0.125,
codes = round(w/s) + 8 = [0, 12, 6], weights back [1.0, -0.5, 0.25].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.scheme import QuantScheme

SMALLEST_SCALE = 2.0**-14
# float16 overflows above 65504; the nearest bfloat16 below it.
LARGEST_SCALE = 65280.0


class Grid(NamedTuple):
    """scales [out, groups] float32; zeros [out, groups] float32 whole numbers, or None where
    symmetric.
    """

    scales: Tensor
    zeros: Tensor | None


def round_scales(scales: Tensor) -> Tensor:
    """Scales as float32 that bfloat16 and float16 both hold exactly: sign kept, 2**-14 <= |s| <=
    65280.
    """
    rounded = scales.to(torch.bfloat16).to(torch.float32)
    sign = torch.where(rounded < 0, -1.0, 1.0)
    return sign * rounded.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE)


def grouped(weight: Tensor, scheme: QuantScheme) -> Tensor:
    """[out, in] -> [out, groups, width]."""
    out_features, in_features = weight.shape
    return weight.reshape(out_features, scheme.num_groups(in_features), -1)


def fit_absmax(weight: Tensor, scheme: QuantScheme) -> Grid:
    """Signed full-range scales: the largest magnitude of each group lands on code 0.  weight
    [out, in] float32.
    """
    groups = grouped(weight, scheme)
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return Grid(round_scales(extreme / -scheme.midpoint), None)


def fit_minmax(weight: Tensor, scheme: QuantScheme) -> Grid:
    """Asymmetric grid from each group's range, widened to hold zero.  weight [out, in] float32."""
    groups = grouped(weight, scheme)
    low = groups.amin(-1).clamp(max=0.0)
    high = groups.amax(-1).clamp(min=0.0)
    scales = round_scales((high - low) / (scheme.num_codes - 1))
    zeros = torch.round(-low / scales).clamp(0, scheme.num_codes - 1)
    return Grid(scales, zeros)


def fit(weight: Tensor, scheme: QuantScheme) -> Grid:
    return fit_absmax(weight, scheme) if scheme.symmetric else fit_minmax(weight, scheme)


def codes(weight: Tensor, grid: Grid, scheme: QuantScheme) -> Tensor:
    """Nearest codes, ties to even.  weight [out, in] float32 -> [out, in] uint8."""
    groups = grouped(weight, scheme)
    zeros = float(scheme.midpoint) if grid.zeros is None else grid.zeros.unsqueeze(-1)
    steps = torch.round(groups / grid.scales.unsqueeze(-1)) + zeros
    return steps.clamp(0, scheme.num_codes - 1).to(torch.uint8).reshape(weight.shape)


def dequantize(codes: Tensor, scales: Tensor, zeros: Tensor | None, scheme: QuantScheme) -> Tensor:
    """codes [out, in] uint8, scales and zeros [out, groups] -> [out, in] float32."""
    groups = grouped(codes, scheme).to(torch.float32)
    offset = float(scheme.midpoint) if zeros is None else zeros.unsqueeze(-1).to(torch.float32)
    values = (groups - offset) * scales.unsqueeze(-1).to(torch.float32)
    return values.reshape(codes.shape)
