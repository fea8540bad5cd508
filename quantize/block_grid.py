"""GPTQ onto the grids of GGUF blocks: scales frozen as stored, codes chosen with error feedback.

    1. the type's own search, weighted by diag(H), gives every sub-block its scale and minimum, in
       the precision that the file has
    2. columns by falling diag(H), each rounded on its frozen grid, its error pushed into the
       columns still to come, as in gptq.py: in recursive halves, with one Cholesky
    3. code descent: with R = (W - Q) H the best change of one code, all others held, is
       R_j / (s H_jj) steps, rounded and clamped; it never raises the error (refine.py)
    4. rows are independent: each keeps what has the lowest error d H dᵀ, plain rounding included

The result has the layout, the size and the reader of plain quantization: only codes differ.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.codecs import BLOCK_CODECS, quantize
from qtool.convert.gguf.grids import HIGHEST, read_grid, with_codes
from qtool.quantize.damping import factored, raised

DAMPING = 0.01
DESCENT_ROUNDS = 3
_BLOCK_COLUMNS = 64
_LEAF_COLUMNS = 16


class BlockSolution(NamedTuple):
    """data         uint8 [out, row_bytes]
    dequantized  float32 [out, in]
    error        tr(d H dᵀ) of it; plain_error that of plain quantization with importance
    """

    data: Tensor
    dequantized: Tensor
    error: float
    plain_error: float


def solve(
    type: str, weight: Tensor, hessian: Tensor, importances: Sequence[Tensor] = ()
) -> BlockSolution:
    """The best rows of `type` for inputs of this second moment.

    weight       [out, in] float32
    hessian      [in, in] float32, E[x xᵀ]
    importances  [in] each: other importance that plain quantization may be tried with
    """
    read = BLOCK_CODECS[type].dequantize
    diagonal = hessian.diagonal().contiguous()
    first = best = quantize(type, weight, diagonal)
    values = read(best)
    errors = row_errors(weight - values, hessian)
    for importance in importances:
        best, values, errors = _better(
            best, values, errors, quantize(type, weight, importance), type, weight, hessian
        )
    plain = float(errors.sum())
    if type in HIGHEST:
        found = _search(type, weight, hessian, diagonal, first)
        if found is not None:
            best, values, errors = _better(best, values, errors, found, type, weight, hessian)
    return BlockSolution(best, values, float(errors.sum()), plain)


def row_errors(difference: Tensor, hessian: Tensor) -> Tensor:
    """d H dᵀ of each row, [out] float64."""
    return ((difference @ hessian) * difference).double().sum(1)


def _better(
    best: Tensor,
    values: Tensor,
    errors: Tensor,
    other: Tensor,
    type: str,
    weight: Tensor,
    hessian: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    other_values = BLOCK_CODECS[type].dequantize(other)
    other_errors = row_errors(weight - other_values, hessian)
    better = other_errors < errors
    return (
        torch.where(better[:, None], other, best),
        torch.where(better[:, None], other_values, values),
        torch.where(better, other_errors, errors),
    )


def _search(
    type: str, weight: Tensor, hessian: Tensor, diagonal: Tensor, data: Tensor
) -> Tensor | None:
    order = torch.argsort(diagonal, descending=True, stable=True)
    found = factorize(hessian, order)
    if found is None:
        return None
    upper, damped = found
    grid = read_grid(type, data)
    unused = grid.scales == 0
    scales = torch.where(unused, 1.0, grid.scales)
    highest = torch.where(unused, 0.0, float(grid.highest))
    shifted = weight + grid.minima
    codes = sweep(shifted, scales, torch.zeros_like(scales), highest, order, upper)
    for _ in range(DESCENT_ROUNDS):
        if not descend(shifted, codes, scales, highest, damped):
            break
    return with_codes(type, data, codes.to(torch.uint8))


def factorize(hessian: Tensor, order: Tensor) -> tuple[Tensor, Tensor] | None:
    """U, upper triangular with UᵀU = H⁻¹ for the damped H in an order, its rows divided by their
    diagonal; and the damped H as it came. None where no damping within reach makes it factor.

    With J the reversal, JHJ = LLᵀ gives H = RRᵀ, R = JLJ, and U = R⁻¹.
    """

    def inverse(lower: Tensor) -> Tensor:
        identity = torch.eye(lower.shape[0], dtype=lower.dtype)
        upper: Tensor = torch.linalg.solve_triangular(lower, identity, upper=False).flip(0, 1)
        return upper / upper.diagonal()[:, None]

    found = factored(hessian[order][:, order].flip(0, 1), DAMPING, inverse)
    if found is None:
        return None
    damped = hessian.clone()
    damped.diagonal().copy_(raised(hessian.diagonal(), found.share))
    return found.result, damped


def sweep(
    weight: Tensor, scales: Tensor, lowest: Tensor, highest: Tensor, order: Tensor, upper: Tensor
) -> Tensor:
    """Whole steps [out, in] float32 for a grid that is any scale and any range for each weight.

    weight, scales, lowest, highest  [out, in] float32
    order                            [in] int64, in which columns are taken
    upper                            [in, in], of `factorize` with that order
    """
    left, step, low, high = (
        values.t()[order].contiguous() for values in (weight, scales, lowest, highest)
    )
    state = _Sweep(left, step, low, high, upper, torch.empty_like(left), torch.empty_like(left))
    _solve_columns(state, 0, weight.shape[1])
    steps = torch.empty_like(state.steps)
    steps[order] = state.steps
    return steps.t().contiguous()


class _Sweep(NamedTuple):
    """All [in, out] in the order of solving but `upper` [in, in]."""

    weight: Tensor
    scales: Tensor
    lowest: Tensor
    highest: Tensor
    upper: Tensor
    errors: Tensor
    steps: Tensor


def _solve_columns(state: _Sweep, start: int, stop: int) -> None:
    if stop - start > _LEAF_COLUMNS:
        middle = (start + stop) // 2
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


def descend(
    shifted: Tensor, codes: Tensor, scales: Tensor, highest: Tensor, hessian: Tensor
) -> int:
    """Move each code, column by column, to the best of its grid, in place; returns how many moved.

    shifted  [out, in], the weight plus its minima, so that it is to be scales * codes
    """
    residual = (shifted - scales * codes) @ hessian
    diagonal = hessian.diagonal()
    moved = 0
    for start in range(0, codes.shape[1], _BLOCK_COLUMNS):
        stop = min(start + _BLOCK_COLUMNS, codes.shape[1])
        local = residual[:, start:stop].t().contiguous()
        changes = torch.zeros_like(local)
        block = hessian[start:stop, start:stop]
        for j in range(start, stop):
            scale, old = scales[:, j], codes[:, j]
            steps = torch.round(old + local[j - start] / (scale * diagonal[j]))
            new = torch.minimum(steps.clamp_(min=0), highest[:, j])
            change = (new - old) * scale
            local.addr_(block[j - start], change, alpha=-1)
            changes[j - start] = change
            moved += int((change != 0).sum())
            codes[:, j] = new
        residual -= changes.t() @ hessian[start:stop]
    return moved
