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
  H = R Rᵀ with R = J L J upper triangular, and H⁻¹ = R⁻ᵀ R⁻¹, so U = R⁻¹ = J L⁻¹ J: one Cholesky
  and one triangular solve in place of two Cholesky factorizations and an inverse. Everything is
  kept reversed, so that nothing is flipped: columns are solved from the last to the first.
- *Recursive halves in place of lazy blocks*: solve the left half, update the right half by one
  matrix product, solve it. The same sums as the paper's blocks of 128, with matrix products at
  every scale. The weight is held transposed, [in, out], so that a column is contiguous.
- *Damping* (damping.py): with retries, in float64 too; where nothing helps the layer is rounded to
  nearest on the searched grid, and its report says so.
- *Dead columns* (inputs that were always zero) are rounded plainly and move nothing.
- *Past single moves*, at `best`: a tabu search (tabu.py) trades codes against each other where no
  code alone can move any more.
- *Never worse than rounding*: rows are independent, so a row where plain absmax rounding has the
  lower error keeps that instead.

Rows share H, so linears that share an input are solved as one stacked weight, a slice of rows at a
time. Memory: three matrices of H's size, and a few of a slice's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool import grid
from qtool.grid import Grid
from qtool.quantize import rtn
from qtool.quantize.damping import factored, raised
from qtool.quantize.refine import refine
from qtool.quantize.scales import search
from qtool.quantize.solution import Solution, from_codes, joined
from qtool.quantize.tabu import tabu_search
from qtool.recipe import Gptq
from qtool.scheme import QuantScheme

# Columns solved one at a time before a matrix product takes over: 8 to 64 take the same time (51 to
# 53 ms for 1024 x 1024 on one Zen 5 core), 4 and 128 take more.
_LEAF_COLUMNS = 16
# Weights of a slice of rows; bounds the temporaries at about six times 64 MB.
_SLICE_WEIGHTS = 2**24

NOT_FACTORED = "the Hessian could not be factored, so this layer was rounded to nearest"
IN_FLOAT64 = "the Hessian could be factored in float64 alone"


class Factor(NamedTuple):
    """lower    [in, in] L⁻¹ for the reversed, damped H: lower triangular
    damping  the share that made it factor
    in_float64  float32 did not do
    """

    lower: Tensor
    damping: float
    in_float64: bool


def solve(weight: Tensor, hessian: Tensor, scheme: QuantScheme, options: Gptq) -> Solution:
    """Quantize a weight against the second moment of its inputs.

    weight   [out, in] float32
    hessian  [in, in]  float32, E[x xᵀ] over the calibration inputs
    """
    diagonal = hessian.diagonal()
    # Solved last to first, so the loudest column comes last.
    order = torch.argsort(diagonal, descending=True, stable=True).flip(0)
    factor = factorize(hessian, order, options.damping)
    if factor is None:
        said = (NOT_FACTORED,)
        return rtn.solve(weight, scheme, scale_search=True, importance=diagonal, fallbacks=said)
    fallbacks: tuple[str, ...] = ()
    if factor.damping > options.damping:
        fallbacks = (f"damping raised to {factor.damping:g}",)
    if factor.in_float64:
        fallbacks = (*fallbacks, IN_FLOAT64)
    after = options.refine_rounds + options.tabu_steps > 0
    damped = _damped(hessian, factor.damping) if after else None
    rows = max(1, _SLICE_WEIGHTS // weight.shape[1])
    parts = []
    for part in (weight[start : start + rows] for start in range(0, weight.shape[0], rows)):
        found = search(part, scheme, diagonal) if options.scale_search else grid.fit(part, scheme)
        codes = _sweep(part, found, scheme, order, factor.lower)
        if damped is not None:
            codes, found = _refined(part, codes, found, scheme, damped, options)
        solved = from_codes(codes, found, scheme, fallbacks)
        parts.append(rtn.keep_better_rows(part, hessian, solved))
    return joined(parts)


def _refined(
    weight: Tensor,
    codes: Tensor,
    found: Grid,
    scheme: QuantScheme,
    hessian: Tensor,
    options: Gptq,
) -> tuple[Tensor, Grid]:
    """What comes after the sweep; the scales are fitted again to what a search has found."""
    codes, found = refine(weight, codes, found, scheme, hessian, rounds=options.refine_rounds)
    if not options.tabu_steps:
        return codes, found
    codes = tabu_search(weight, codes, found, scheme, hessian, steps=options.tabu_steps)
    return refine(weight, codes, found, scheme, hessian, rounds=1)


def factorize(hessian: Tensor, order: Tensor, damping: float) -> Factor | None:
    """L⁻¹ of the damped Hessian in an order, or None where no damping within reach makes it
    factor.

    order  [in] int64, the reverse of the order of solving
    """

    def inverse(lower: Tensor) -> Tensor:
        found = torch.eye(lower.shape[0], dtype=lower.dtype, device=lower.device)
        torch.linalg.solve_triangular(lower, found, upper=False, out=found)
        return found

    found = factored(hessian[order.unsqueeze(1), order], damping, inverse)
    return None if found is None else Factor(found.result, found.share, found.in_float64)


def _damped(hessian: Tensor, share: float) -> Tensor:
    damped = hessian.clone()
    damped.diagonal().copy_(raised(hessian.diagonal(), share))
    return damped


def _sweep(
    weight: Tensor, found: Grid, scheme: QuantScheme, order: Tensor, lower: Tensor
) -> Tensor:
    """Codes [out, in] uint8, in the file's column order."""
    in_features = weight.shape[1]
    groups = (order // scheme.group_width(in_features)).tolist()
    scales = found.scales.t().contiguous()
    zeros = torch.full_like(scales, float(scheme.midpoint))
    if found.zeros is not None:
        zeros = found.zeros.t().contiguous()
    state = _State(
        weight=weight.t()[order].contiguous(),
        scales=scales,
        zeros=zeros,
        groups=groups,
        lower=lower,
        pivots=lower.diagonal().tolist(),
        highest=scheme.num_codes - 1,
        errors=weight.new_empty(in_features, weight.shape[0]),
        codes=weight.new_empty(in_features, weight.shape[0], dtype=torch.uint8),
    )
    _solve_columns(state, 0, in_features)
    codes = torch.empty_like(state.codes)
    codes[order] = state.codes
    return codes.t().contiguous()


class _State(NamedTuple):
    """weight, errors, codes [in, out] in reversed order; scales, zeros [groups, out]; groups [in];
    lower [in, in]; pivots [in], its diagonal.
    """

    weight: Tensor
    scales: Tensor
    zeros: Tensor
    groups: list[int]
    lower: Tensor
    pivots: list[float]
    highest: int
    errors: Tensor
    codes: Tensor


def _solve_columns(state: _State, start: int, stop: int) -> None:
    """Solve columns [start, stop), last to first, each pushing its error to those before it."""
    if stop - start > _LEAF_COLUMNS:
        # Cut at a multiple of the leaf from the end, so that all leaves but the first are full.
        half = (stop - start) // 2
        middle = stop - -(-half // _LEAF_COLUMNS) * _LEAF_COLUMNS
        _solve_columns(state, middle, stop)
        pushed = state.lower[middle:stop, start:middle].t() @ state.errors[middle:stop]
        state.weight[start:middle] -= pushed
        _solve_columns(state, start, middle)
        return
    for j in range(stop - 1, start - 1, -1):
        column, scale = state.weight[j], state.scales[state.groups[j]]
        zero = state.zeros[state.groups[j]]
        code = torch.round(column / scale).add_(zero).clamp_(0, state.highest)
        state.codes[j] = code
        error = torch.addcmul(column, code.sub_(zero), scale, value=-1, out=state.errors[j])
        error.div_(state.pivots[j])
        if j > start:
            state.weight[start:j].addr_(state.lower[j, start:j], error, alpha=-1)
