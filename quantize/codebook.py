"""Codes that are places in a table of their row's own, solved against the layer's Hessian.

    tables       weighted k-means, the best for rounding alone (tables.py)
    sweep        GPTQ's error feedback onto those tables, columns by falling diag(H) (gptq.py has
                 the formulas)
    refinement   rounds of: each entry moved to where the error is lowest while the codes and the
                 other entries stand still, then each code likewise

With R = (W - Q) H, an entry whose inputs are t (0 or 1 for each column of the row) is best moved by
(R . t) / (t H t); a code of column j is best taken nearest to Q_j + R_j / H_jj. Entries are rounded
to what the file stores and moved only where the error falls, so that it never rises. A row that is
better off as k-means had it, or on the absmax grid of as many bits, keeps that.

Without data (no Hessian) the tables alone are left, with all weights of equal importance.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qtool.quantize import rtn
from qtool.quantize.damping import raised
from qtool.quantize.gptq import IN_FLOAT64, Factor, factorize
from qtool.quantize.solution import Solution, row_errors
from qtool.quantize.tables import best_tables, looked_up, nearest
from qtool.recipe import Gptq
from qtool.scheme import FloatScheme, QuantScheme
from qtool.weights import TableWeight

_LEAF_COLUMNS = 16
# Weights of a slice of rows; bounds the temporaries.
_SLICE_WEIGHTS = 2**22

NOT_SWEPT = "the Hessian could not be factored, so this layer has k-means tables without a sweep"


def solve(
    weight: Tensor,
    hessian: Tensor | None,
    scheme: FloatScheme,
    options: Gptq | None,
    fallbacks: tuple[str, ...] = (),
) -> Solution:
    """Quantize a weight onto a table a row.

    weight   [out, in] float32
    hessian  [in, in] float32, E[x xᵀ] over the calibration inputs; None where there are none
    options  None for k-means alone
    """
    entries = as_integers(scheme).num_codes
    importance = weight.new_ones(weight.shape[1])
    factor, order = None, None
    if hessian is not None and bool((hessian.diagonal() > 0).any()):
        importance = hessian.diagonal() + 1e-3 * hessian.diagonal().mean()
        if options is not None:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True).flip(0)
            factor = factorize(hessian, order, options.damping)
            fallbacks = (*fallbacks, *_said(factor, options.damping))
    height = max(1, _SLICE_WEIGHTS // weight.shape[1])
    codes, tables = [], []
    for start in range(0, weight.shape[0], height):
        part = weight[start : start + height]
        found = best_tables(part, importance, entries)
        best = nearest(part, found), found
        if factor is not None and order is not None and hessian is not None:
            swept = _sweep(part, found, order, factor.lower)
            damped = hessian.clone()
            damped.diagonal().copy_(raised(hessian.diagonal(), factor.damping))
            assert options is not None
            refined = _refine(part, swept, found, damped, options.refine_rounds)
            best = _better(part, hessian, refined, best)
            best = _better(part, hessian, best, _plain(part, entries, found.dtype))
        codes.append(best[0])
        tables.append(best[1])
    dtype = torch.float32 if any(t.dtype == torch.float32 for t in tables) else torch.float16
    stored = TableWeight(torch.cat(codes), torch.cat([t.to(dtype) for t in tables]), scheme)
    return Solution(stored, stored.dequantize(), fallbacks)


def as_integers(scheme: FloatScheme) -> QuantScheme:
    """The plain scheme of as many bits, to compare with."""
    assert scheme.table_bits is not None, scheme
    return QuantScheme(scheme.table_bits, None)


def _said(factor: Factor | None, damping: float) -> tuple[str, ...]:
    if factor is None:
        return (NOT_SWEPT,)
    said = (f"damping raised to {factor.damping:g}",) if factor.damping > damping else ()
    return (*said, IN_FLOAT64) if factor.in_float64 else said


def _plain(weight: Tensor, entries: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Plain rounding to a grid of one scale a row, as codes and tables."""
    scheme = QuantScheme((entries - 1).bit_length(), None)
    rounded = rtn.solve(weight, scheme).integers
    steps = torch.arange(entries, device=weight.device) - scheme.midpoint
    return rounded.codes, (rounded.scales * steps).to(dtype)


def _better(
    weight: Tensor, hessian: Tensor, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Each row's better of two, ties to the first."""
    lost = [row_errors(weight, looked_up(*found), hessian) for found in (first, second)]
    pick = (lost[1] < lost[0]).unsqueeze(1)
    return torch.where(pick, second[0], first[0]), torch.where(pick, second[1], first[1])


def _columns(
    start: int,
    stop: int,
    visit: Callable[[int, int], None],
    push: Callable[[int, int, int], None],
) -> None:
    """Visit columns in order, leaf by leaf; `push(start, middle, stop)` carries what was done to
    the first half over to the second by one matrix product, so that there are products at every
    scale.
    """
    if stop - start <= _LEAF_COLUMNS:
        visit(start, stop)
        return
    middle = start + -(-(stop - start) // (2 * _LEAF_COLUMNS)) * _LEAF_COLUMNS
    _columns(start, middle, visit, push)
    push(start, middle, stop)
    _columns(middle, stop, visit, push)


def _sweep(weight: Tensor, tables: Tensor, order: Tensor, lower: Tensor) -> Tensor:
    """Codes [out, in] uint8.

    order  [in], the reverse of the order of solving; lower [in, in], as gptq.factorize gives it
    """
    forwards = order.flip(0)
    state = weight.t()[forwards].contiguous()
    factor = lower.flip(0, 1).contiguous()
    codes = torch.empty_like(state, dtype=torch.uint8)
    errors = torch.empty_like(state)
    rounder = _Rounder(tables)

    def visit(start: int, stop: int) -> None:
        for j in range(start, stop):
            codes[j], value = rounder(state[j])
            errors[j] = (state[j] - value) / factor[j, j]
            if j + 1 < stop:
                state[j + 1 : stop].addr_(factor[j, j + 1 : stop], errors[j], alpha=-1)

    def push(start: int, middle: int, stop: int) -> None:
        state[middle:stop] -= factor[start:middle, middle:stop].t() @ errors[start:middle]

    _columns(0, weight.shape[1], visit, push)
    found = torch.empty_like(codes)
    found[forwards] = codes
    return found.t().contiguous()


class _Rounder:
    """Columns [out] to codes [out] uint8 and values [out].  tables [out, entries], ascending"""

    def __init__(self, tables: Tensor) -> None:
        self._tables = tables.to(torch.float32).t().contiguous()
        self._bounds = ((self._tables[1:] + self._tables[:-1]) / 2).contiguous()

    def __call__(self, column: Tensor) -> tuple[Tensor, Tensor]:
        codes = (column > self._bounds).sum(0)
        return codes.to(torch.uint8), self._tables.gather(0, codes.unsqueeze(0)).squeeze(0)


def _refine(
    weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor, rounds: int
) -> tuple[Tensor, Tensor]:
    """hessian  [in, in] float32, damped"""
    for _ in range(rounds):
        tables = _refit(weight, codes, tables, hessian)
        # Entries may have passed one another.
        tables, order = tables.sort(1)
        places = torch.argsort(order, 1)
        codes = torch.gather(places, 1, codes.long()).to(torch.uint8)
        codes = _descend(weight, codes, tables, hessian)
    return codes, tables


def _refit(weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor) -> Tensor:
    """Tables [out, entries], entry by entry, each knowing what the ones before it changed."""
    tables = tables.clone()
    residual = (weight - looked_up(codes, tables)) @ hessian
    for entry in range(tables.shape[1]):
        taken = (codes == entry).to(torch.float32)
        reach = taken @ hessian
        slope = (residual * taken).sum(1)
        curvature = (reach * taken).sum(1)
        old = tables[:, entry].to(torch.float32)
        best = old + torch.where(curvature > 0, slope / curvature.clamp(min=1e-30), 0.0)
        change = best.to(tables.dtype).to(torch.float32) - old
        # The error changes by change * (change * curvature - 2 * slope).
        falls = (change * (change * curvature - 2 * slope) < 0) & torch.isfinite(change)
        change = torch.where(falls, change, 0.0)
        tables[:, entry] = (old + change).to(tables.dtype)
        residual -= change.unsqueeze(1) * reach
    return tables


def _descend(weight: Tensor, codes: Tensor, tables: Tensor, hessian: Tensor) -> Tensor:
    """Codes [out, in] uint8 after one pass over the columns."""
    values = looked_up(codes, tables)
    residual = ((weight - values) @ hessian).t().contiguous()
    values = values.t().contiguous()
    moves = torch.zeros_like(values)
    found = torch.empty_like(values, dtype=torch.uint8)
    diagonal = hessian.diagonal().tolist()
    rounder = _Rounder(tables)

    def visit(start: int, stop: int) -> None:
        for j in range(start, stop):
            found[j], value = rounder(values[j] + residual[j] / diagonal[j])
            moves[j] = value - values[j]
            if j + 1 < stop:
                residual[j + 1 : stop].addr_(hessian[j, j + 1 : stop], moves[j], alpha=-1)

    def push(start: int, middle: int, stop: int) -> None:
        residual[middle:stop] -= hessian[start:middle, middle:stop].t() @ moves[start:middle]

    _columns(0, weight.shape[1], visit, push)
    return found.t().contiguous()
