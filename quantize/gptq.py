"""GPTQ: quantize a weight column by column, pushing each column's error into those still to come.

For a linear with inputs x and second moment H = E[x xᵀ], the output error of a row is d H dᵀ.
Rounding column j by e_j is best compensated by moving the later columns by
-e_j U[j, j+1:] / U[j, j], where H⁻¹ = Uᵀ U and U is upper triangular (Frantar et al., arXiv
2210.17323). Here:

- *Act-order, statically*: columns are taken by falling diag(H), while each group's grid is chosen
  beforehand from the weights as they are in the file. The groups stay contiguous, so no g_idx and
  `desc_act` false on disk.
- *Grids before the sweep*: `scales.search` weighted by diag(H), frozen, already rounded to what
  the file stores.
- *U without an explicit inverse*: with J the reversal of rows and columns, J H J = L Lᵀ gives
  H = R Rᵀ with R = J L J upper triangular, and H⁻¹ = R⁻ᵀ R⁻¹, so U = R⁻¹: one Cholesky and one
  triangular solve in place of two Cholesky factorizations and an inverse.
- *Recursive halves in place of lazy blocks*: solve the left half, update the right half by one
  matrix product, solve it. The same sums as the paper's blocks of 128, with matrix products at
  every scale. The weight is held transposed, [in, out], so that a column is contiguous.
- *Damping*: a share of mean(diag H) is added to the diagonal; where the factorization fails it is
  tried in float64, then with ten times the damping, three times; after that the layer is rounded
  to nearest on the searched grid, and its report says so.
- *Dead columns* (inputs that were always zero) are rounded plainly and move nothing.
- *Never worse than rounding*: rows are independent, so a row where plain absmax rounding has the
  lower error keeps that instead.

Rows share H, so linears that share an input are solved as one stacked weight.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool import grid
from qtool.grid import Grid
from qtool.quantize import rtn
from qtool.quantize.refine import refine
from qtool.quantize.scales import search
from qtool.quantize.solution import Solution, from_codes
from qtool.recipe import Gptq
from qtool.scheme import QuantScheme

# Columns solved one at a time before a matrix product takes over: 8 to 64 take the same time (51 to
# 53 ms for 1024 x 1024 on one Zen 5 core), 4 and 128 take more.
_LEAF_COLUMNS = 16
_DAMPING_ATTEMPTS = 4


class Factor(NamedTuple):
    """upper    [in, in] U, upper triangular, H⁻¹ = Uᵀ U for the ordered and damped H
    damping  the share that made it factor
    """

    upper: Tensor
    damping: float


def solve(weight: Tensor, hessian: Tensor, scheme: QuantScheme, options: Gptq) -> Solution:
    """Quantize a weight against the second moment of its inputs.

    weight   [out, in] float32
    hessian  [in, in]  float32, E[x xᵀ] over the calibration inputs
    """
    diagonal = hessian.diagonal()
    found = search(weight, scheme, diagonal) if options.scale_search else grid.fit(weight, scheme)
    order = torch.argsort(diagonal, descending=True, stable=True)
    ordered = hessian[order][:, order]
    factor = factorize(ordered, options.damping)
    if factor is None:
        note = "the Hessian could not be factored, so this layer was rounded to nearest"
        return rtn.solve(weight, scheme, scale_search=True, importance=diagonal, notes=(note,))
    codes = _sweep(weight, found, scheme, order, factor.upper)
    if options.refine_rounds:
        damped = _damped(hessian, factor.damping)
        codes, found = refine(weight, codes, found, scheme, damped, rounds=options.refine_rounds)
    notes: tuple[str, ...] = ()
    if factor.damping > options.damping:
        notes = (f"damping raised to {factor.damping:g}",)
    return rtn.keep_better_rows(weight, hessian, from_codes(codes, found, scheme, notes))


def factorize(hessian: Tensor, damping: float) -> Factor | None:
    """U of the damped Hessian, or None where no damping within reach makes it factor."""
    for attempt in range(_DAMPING_ATTEMPTS):
        share = damping * 10**attempt
        damped = _damped(hessian, share)
        for dtype in (torch.float32, torch.float64):
            upper = _inverse_factor(damped.to(dtype))
            if upper is not None:
                return Factor(upper.to(torch.float32), share)
    return None


def _damped(hessian: Tensor, share: float) -> Tensor:
    """H with its diagonal raised, and one in place of a dead column's zero."""
    diagonal = hessian.diagonal()
    raised = torch.where(diagonal == 0, 1.0, diagonal + share * diagonal.mean())
    damped = hessian.clone()
    damped.diagonal().copy_(raised)
    return damped


def _inverse_factor(hessian: Tensor) -> Tensor | None:
    """U upper triangular with Uᵀ U = H⁻¹; None where H is not positive definite."""
    lower, info = torch.linalg.cholesky_ex(hessian.flip(0, 1))
    if int(info) != 0:
        return None
    identity = torch.eye(hessian.shape[0], dtype=hessian.dtype, device=hessian.device)
    upper = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
    return upper if bool(torch.isfinite(upper).all()) else None


def _sweep(
    weight: Tensor, found: Grid, scheme: QuantScheme, order: Tensor, upper: Tensor
) -> Tensor:
    """Codes [out, in] uint8, in the file's column order."""
    in_features = weight.shape[1]
    group = order // scheme.group_width(in_features)
    scales = found.scales.t()[group].contiguous()
    zeros = torch.full_like(scales, float(scheme.midpoint))
    if found.zeros is not None:
        zeros = found.zeros.t()[group].contiguous()
    state = _State(
        weight=weight.t()[order].contiguous(),
        scales=scales,
        lowest=-zeros,
        highest=scheme.num_codes - 1 - zeros,
        upper=upper / upper.diagonal().unsqueeze(1),
        errors=torch.empty_like(scales),
        steps=torch.empty_like(scales),
    )
    _solve_columns(state, 0, in_features)
    codes = torch.empty_like(state.steps, dtype=torch.uint8)
    codes[order] = (state.steps + zeros).to(torch.uint8)
    return codes.t().contiguous()


class _State(NamedTuple):
    """All [in, out] in processing order but `upper` [in, in], whose rows are divided by their
    diagonal, so that a column's plain rounding error is what is pushed on.
    """

    weight: Tensor
    scales: Tensor
    lowest: Tensor
    highest: Tensor
    upper: Tensor
    errors: Tensor
    steps: Tensor


def _solve_columns(state: _State, start: int, stop: int) -> None:
    if stop - start > _LEAF_COLUMNS:
        # Halves are cut at a multiple of the leaf, so that all leaves but the last are full.
        half = (stop - start) // 2
        middle = start + -(-half // _LEAF_COLUMNS) * _LEAF_COLUMNS
        _solve_columns(state, start, middle)
        pushed = state.upper[start:middle, middle:stop].t() @ state.errors[start:middle]
        state.weight[middle:stop] -= pushed
        _solve_columns(state, middle, stop)
        return
    for j in range(start, stop):
        column = state.weight[j]
        steps = torch.round(column / state.scales[j])
        steps = torch.clamp(steps, state.lowest[j], state.highest[j], out=state.steps[j])
        error = torch.addcmul(column, steps, state.scales[j], value=-1, out=state.errors[j])
        if j + 1 < stop:
            state.weight[j + 1 : stop].addr_(state.upper[j, j + 1 : stop], error, alpha=-1)
