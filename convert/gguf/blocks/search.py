"""ggml's searches for the scale (and minimum) of a block: the core of every K-quant.

Rounding to nearest on the obvious grid is not the best a block can do: these try a handful of
grids, solve the weighted least squares for each grid's codes, and keep the best. They follow
ggml-quants.c (make_qx_quants, make_qkx2_quants, make_qkx3_quants, make_q3_quants, make_qp_quants)
step for step, since the bits of a file are to be those of llama-quantize.

All arrays are lane-major, [lanes, blocks] float32; scales and minima are [blocks].
A search keeps which grid won, not that grid's codes: codes are recomputed once at the end, which
spares a select over the whole array at each step.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.convert.gguf.blocks.lanes import (
    LaneSums,
    as_byte,
    constant,
    divide,
    finite_inverse,
    lane_sum,
    lowest,
    signed_absmax,
)

GROUP_MAX_EPS = 1e-15  # below this a block is all zeros
DESCENT_PASSES = 5


class ScaleFit(NamedTuple):
    """scales [blocks]; codes [lanes, blocks], whole numbers as float32, from 0."""

    scales: Tensor
    codes: Tensor


class AffineFit(NamedTuple):
    """weight = scales * codes - minima; minima [blocks] are stored positive."""

    scales: Tensor
    minima: Tensor
    codes: Tensor


def fit_scale(x: Tensor, limit: int, weights: Tensor | None) -> ScaleFit:
    """make_qx_quants: signed codes -limit .. limit-1, 18 grids around the absolute maximum.

    weights  [lanes, blocks] importance of each element; None: x squared
    """
    lanes, blocks = x.shape
    peak = signed_absmax(x)
    empty = peak.abs() < GROUP_MAX_EPS
    safe_peak = torch.where(empty, 1.0, peak)
    w = x * x if weights is None else weights
    wx = w * x
    sums = LaneSums(lanes, 2, blocks)
    codes = torch.empty_like(x)

    def evaluate(inverse: Tensor) -> tuple[Tensor, Tensor]:
        torch.mul(inverse, x, out=codes).round_().clamp_(-limit, limit - 1)
        torch.mul(wx, codes, out=sums.terms[:, 0])
        torch.mul(w, codes, out=sums.terms[:, 1]).mul_(codes)
        sum_lx, sum_l2 = sums.total().clone()
        return sum_lx, sum_l2

    winner = constant(-limit) / safe_peak
    sum_lx, sum_l2 = evaluate(winner)
    scales = divide(sum_lx, sum_l2)
    best = scales * sum_lx
    for step in (*range(-9, 0), *range(1, 10)):
        inverse = -(constant(limit) + constant(0.1) * step) / safe_peak
        sum_lx, sum_l2 = evaluate(inverse)
        better = (sum_l2 > 0) & (sum_lx * sum_lx > best * sum_l2)
        scales = torch.where(better, divide(sum_lx, sum_l2), scales)
        best = torch.where(better, scales * sum_lx, best)
        winner = torch.where(better, inverse, winner)
    torch.mul(winner, x, out=codes).round_().clamp_(-limit, limit - 1).add_(limit)
    return ScaleFit(scales.masked_fill(empty, 0.0), codes.masked_fill_(empty, 0.0))


def fit_scale_and_minimum(
    x: Tensor,
    limit: int,
    weights: Tensor,
    *,
    first: float,
    step: float,
    steps: int,
    absolute: bool = False,
) -> AffineFit:
    """make_qkx2_quants and make_qkx3_quants: codes 0 .. limit over a range that includes 0.

    Grid k has inverse scale (first + step*k + limit) / (max - minimum), where `minimum` is the best
    found so far: it moves while the search runs, and later grids start from it. (Taking the block's
    own minimum instead is the usual mistake of rewrites.)

    absolute  compare by weighted |error| instead of its square
    """
    lanes, blocks = x.shape
    least = lowest(x)
    base = torch.where(least > 0, 0.0, least)
    highest = x.amax(0)
    # qkx2 tests max == min, qkx3 max <= min; as min was clamped to 0, max < min never decides.
    flat = highest <= base
    sums = LaneSums(lanes, 3, blocks)
    errors = LaneSums(lanes, 1, blocks)
    error_terms = errors.terms[:, 0]
    wx = weights * x
    sum_w, sum_x = lane_sum(weights), lane_sum(wx)
    codes = torch.empty_like(x)

    def quantize(inverse: Tensor, minimum: Tensor) -> None:
        torch.sub(x, minimum, out=codes).mul_(finite_inverse(inverse)).round_().clamp_(0, limit)

    def error(scales: Tensor, minimum: Tensor) -> Tensor:
        torch.mul(scales, codes, out=error_terms).add_(minimum).sub_(x)
        if absolute:
            error_terms.abs_()
        else:
            error_terms.mul_(error_terms)
        error_terms.mul_(weights)
        return errors.total()[0].clone()

    span = torch.where(flat, 1.0, highest - base)
    winner = constant(float(limit)) / span
    winner_base = minimum = base
    scales = constant(1.0) / winner
    quantize(winner, minimum)
    best = error(scales, minimum)
    for k in range(steps + 1):
        span = torch.where(flat, 1.0, highest - minimum)
        inverse = (constant(first) + constant(step) * k + limit) / span
        quantize(inverse, minimum)
        weighted = sums.terms[:, 0]
        torch.mul(weights, codes, out=weighted)
        torch.mul(weighted, codes, out=sums.terms[:, 1])
        torch.mul(weighted, x, out=sums.terms[:, 2])
        sum_l, sum_l2, sum_xl = sums.total()
        determinant = sum_w * sum_l2 - sum_l * sum_l
        solvable = determinant > 0
        safe = torch.where(solvable, determinant, 1.0)
        trial_scales = (sum_w * sum_xl - sum_x * sum_l) / safe
        trial_minimum = (sum_l2 * sum_x - sum_l * sum_xl) / safe
        positive = trial_minimum > 0
        trial_scales = torch.where(positive, divide(sum_xl, sum_l2), trial_scales)
        trial_minimum = torch.where(positive, 0.0, trial_minimum)
        trial_error = error(trial_scales, trial_minimum)
        better = solvable & (trial_error < best)
        best = torch.where(better, trial_error, best)
        scales = torch.where(better, trial_scales, scales)
        winner = torch.where(better, inverse, winner)
        winner_base = torch.where(better, minimum, winner_base)
        minimum = torch.where(better, trial_minimum, minimum)
    quantize(winner, winner_base)
    scales = scales.masked_fill(flat, 0.0)
    minima = -torch.where(flat, base, minimum)
    return AffineFit(scales, minima, codes.masked_fill_(flat, 0.0))


def fit_positive(x: Tensor, limit: int, weights: Tensor) -> ScaleFit:
    """make_qp_quants: codes 0 .. limit of block scales and minima.

    A few scales are negative, where importance has zeros. The reference sums with their codes as
    they are but keeps them as bytes, so that what it reads back is 256 more; so does this.
    """
    peak = x.amax(0).clamp(min=0.0)
    empty = peak < GROUP_MAX_EPS
    safe_peak = torch.where(empty, 1.0, peak)
    inverse = constant(float(limit)) / safe_peak

    def error(scales: Tensor, codes: Tensor) -> Tensor:
        difference = x - scales * codes
        return lane_sum(weights * difference * difference)

    best = error(constant(1.0) / inverse, as_byte(torch.round(inverse * x)))
    for step in (-4, -3, -2, -1, 1, 2, 3, 4):
        trial = (constant(0.1) * step + limit) / safe_peak
        trial_error = error(constant(1.0) / trial, torch.round(trial * x).clamp_(max=limit))
        better = trial_error < best
        best = torch.where(better, trial_error, best)
        inverse = torch.where(better, trial, inverse)
    codes = torch.round(inverse * x).clamp_(max=limit)
    scales = _descend(x, codes, weights, lower=None, upper=limit)
    return ScaleFit(scales.masked_fill(empty, 0.0), codes.masked_fill_(empty, 0.0))


def fit_scale_by_descent(x: Tensor, limit: int) -> ScaleFit:
    """make_q3_quants: signed codes by coordinate descent from the absolute maximum's grid."""
    peak = signed_absmax(x)
    empty = peak.abs() < GROUP_MAX_EPS
    inverse = constant(-limit) / torch.where(empty, 1.0, peak)
    codes = torch.round(inverse * x).clamp_(-limit, limit - 1)
    scales = _descend(x, codes, x * x, lower=-limit, upper=limit - 1)
    return ScaleFit(scales.masked_fill(empty, 0.0), codes.add_(limit).masked_fill_(empty, 0.0))


def _descend(x: Tensor, codes: Tensor, weights: Tensor, *, lower: int | None, upper: int) -> Tensor:
    """Improve `codes` in place, one lane at a time; returns the least-squares scales.

    Each lane moves to the code that is best with the others held, if that raises the explained
    energy sum_lx**2 / sum_l2; five passes, or until a pass changes nothing in a block.

    lower  None for make_qp_quants, which also requires sum_l2 without the lane to be positive, and
           keeps codes as bytes
    """
    wx = weights * x
    sum_lx = lane_sum(wx * codes)
    sum_l2 = lane_sum(weights * codes * codes)
    if lower is None:
        codes.copy_(as_byte(codes))
    active = torch.ones_like(sum_lx, dtype=torch.bool)
    for _ in range(DESCENT_PASSES):
        changed = torch.zeros_like(active)
        for lane in range(x.shape[0]):
            code, w = codes[lane], weights[lane]
            rest_lx = sum_lx - wx[lane] * code
            rest_l2 = sum_l2 - w * code * code
            accept = active & (rest_lx > 0)
            if lower is None:
                accept &= rest_l2 > 0
            trial = torch.round(x[lane] * rest_l2 / torch.where(accept, rest_lx, 1.0))
            trial = trial.clamp_(lower, upper)
            accept &= trial != code
            new_lx = rest_lx + wx[lane] * trial
            new_l2 = rest_l2 + w * trial * trial
            if lower is not None:
                accept &= new_l2 > 0
            accept &= new_lx * new_lx * sum_l2 > sum_lx * sum_lx * new_l2
            kept = as_byte(trial) if lower is None else trial
            codes[lane] = torch.where(accept, kept, code)
            sum_lx = torch.where(accept, new_lx, sum_lx)
            sum_l2 = torch.where(accept, new_l2, sum_l2)
            changed |= accept
        active &= changed
        if not bool(active.any()):
            break
    return torch.where(sum_l2 > 0, divide(sum_lx, sum_l2), 0.0)
