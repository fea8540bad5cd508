"""After GPTQ: refit scales in closed form and move single codes, each step lowering the error.

With R = (W - Q) H for the dequantized weight Q, the error of a row, tr((W - Q) H (W - Q)ᵀ), is
quadratic in every scale and every code, so each has a best value while the rest stand still:

    scale of group g   s <- s + (R_g · q_g) / (q_gᵀ H_gg q_g)       q = code - zero
    code of column j   q <- q + R_j / (s H_jj), rounded and clamped

A scale is rounded to what the file stores and taken only where the error falls; the rounded and
clamped code is the best integer, the error being a parabola in it. So the error never rises, which
a test holds. GPTQ never looks back at a column; this does, and where scales were frozen before
the sweep it fits them to the codes that came out.

Measured (small trained model, 4 bits): KL divergence 0.0746 -> 0.0699 for two rounds; refitting
scales alone gained nothing reliable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.grid import Grid, dequantize, round_scales
from qtool.scheme import QuantScheme

_LEAF_COLUMNS = 16


def refine(
    weight: Tensor,
    codes: Tensor,
    found: Grid,
    scheme: QuantScheme,
    hessian: Tensor,
    *,
    rounds: int,
) -> tuple[Tensor, Grid]:
    """Codes [out, in] uint8 and their grid after `rounds` of scale refit and code descent.

    weight   [out, in] float32
    hessian  [in, in] float32, damped: its null space is where calibration saw nothing
    """
    zeros = found.zeros
    for _ in range(rounds):
        scales, residual = _refit(weight, codes, found, scheme, hessian)
        found = Grid(scales, zeros)
        codes = _descend(residual, codes, found, scheme, hessian)
    return codes, found


def _steps(codes: Tensor, found: Grid, scheme: QuantScheme) -> Tensor:
    """Codes counted from zero, [out, in] float32."""
    return dequantize(codes, torch.ones_like(found.scales), found.zeros, scheme)


def _refit(
    weight: Tensor, codes: Tensor, found: Grid, scheme: QuantScheme, hessian: Tensor
) -> tuple[Tensor, Tensor]:
    """New scales [out, groups], group by group, each knowing what the ones before it changed; and
    R [out, in] for them.
    """
    scales = found.scales.clone()
    residual = (weight - dequantize(codes, scales, found.zeros, scheme)) @ hessian
    steps = _steps(codes, found, scheme)
    width = scheme.group_width(weight.shape[1])
    for group in range(scales.shape[1]):
        columns = slice(group * width, (group + 1) * width)
        reach = steps[:, columns] @ hessian[columns]
        slope = (residual[:, columns] * steps[:, columns]).sum(1)
        curvature = (reach[:, columns] * steps[:, columns]).sum(1)
        best = scales[:, group] + slope / curvature.clamp(min=torch.finfo(torch.float32).tiny)
        change = round_scales(torch.where(curvature > 0, best, scales[:, group]))
        change -= scales[:, group]
        # The error changes by change * (change * curvature - 2 * slope).
        falls = change * (change * curvature - 2 * slope) < 0
        change = torch.where(falls, change, 0.0)
        scales[:, group] += change
        residual -= change.unsqueeze(1) * reach
    return scales, residual


def _descend(
    residual: Tensor, codes: Tensor, found: Grid, scheme: QuantScheme, hessian: Tensor
) -> Tensor:
    """Codes [out, in] uint8 after one pass over the columns."""
    residual = residual.t().contiguous()
    width = scheme.group_width(codes.shape[1])
    scales = found.scales.t().contiguous()
    diagonal = hessian.diagonal().tolist()
    values = codes.t().to(torch.float32).contiguous()
    moves = torch.zeros_like(values)

    def descend(start: int, stop: int) -> None:
        if stop - start > _LEAF_COLUMNS:
            middle = (start + stop) // 2
            descend(start, middle)
            coupling = hessian[start:middle, middle:stop].t()
            residual[middle:stop] -= coupling @ moves[start:middle]
            descend(middle, stop)
            return
        for j in range(start, stop):
            scale = scales[j // width]
            best = torch.round(values[j] + residual[j] / (scale * diagonal[j]))
            best.clamp_(0, scheme.num_codes - 1)
            torch.mul(best - values[j], scale, out=moves[j])
            values[j] = best
            residual[j + 1 : stop].addr_(hessian[j, j + 1 : stop], moves[j], alpha=-1)

    descend(0, codes.shape[1])
    return values.t().to(torch.uint8).contiguous()
