"""Round to nearest: the baseline, the data-free recipe, and what the other solvers fall back to."""

from __future__ import annotations

import torch
from torch import Tensor

from qtool.grid import Grid, fit
from qtool.quantize.scales import search
from qtool.quantize.solution import Solution, from_codes, round_to, row_errors
from qtool.scheme import QuantScheme


def solve(
    weight: Tensor,
    scheme: QuantScheme,
    *,
    scale_search: bool = False,
    importance: Tensor | None = None,
    fallbacks: tuple[str, ...] = (),
) -> Solution:
    """Round each weight to its group's grid.

    weight      [out, in] float32
    importance  [in] float32, weighs the scale search; None for plain squared error
    """
    found = search(weight, scheme, importance) if scale_search else fit(weight, scheme)
    return round_to(weight, found, scheme, fallbacks)


def keep_better_rows(weight: Tensor, hessian: Tensor, solved: Solution) -> Solution:
    """Rows where plain rounding has the lower error take it: rows are independent, so no solver
    need ever be worse than rounding.

    weight   [out, in] float32
    hessian  [in, in]  float32
    """
    kept = solved.integers
    scheme = kept.scheme
    rounded = solve(weight, scheme)
    plain = rounded.integers
    ours = row_errors(weight, solved.dequantized, hessian)
    rounding = row_errors(weight, rounded.dequantized, hessian)
    worse = ours > rounding
    if not bool(worse.any()):
        return solved._replace(lost=ours)
    pick = worse.unsqueeze(1)
    zeros = None
    if kept.zeros is not None and plain.zeros is not None:
        zeros = torch.where(pick, plain.zeros, kept.zeros).float()
    scales = torch.where(pick, plain.scales, kept.scales)
    codes = torch.where(pick, plain.codes, kept.codes)
    mended = from_codes(codes, Grid(scales, zeros), scheme, solved.fallbacks)
    return mended._replace(lost=torch.where(worse, rounding, ours))
