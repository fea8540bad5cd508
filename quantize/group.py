"""Solve linears that share an input: one stacked solve for each scheme, and its report."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.artifact import LayerReport
from qtool.calibration.capture import BlockCapture
from qtool.calibration.groups import Stage
from qtool.calibration.linears import Linear, Site
from qtool.calibration.placement import CPU, device_peak_bytes
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Drift, Moments, total
from qtool.errors import QtoolError
from qtool.quantize import awq, codebook, gptq, rtn
from qtool.quantize.correction import correct
from qtool.quantize.layouts import Scheme
from qtool.quantize.solution import (
    Solution,
    on,
    power,
    relative_error,
    row_errors,
    rows,
    share,
)
from qtool.recipe import Awq, Gptq, SmoothQuant, method_name
from qtool.scheme import FloatScheme, QuantScheme

FEW_TOKENS = "fewer tokens than inputs reached this expert, so the layer's other experts fill in"
NO_CORRECTION = "its correction could not be computed, so it was quantized as it was"
NO_TOKENS = "no calibration token reached it, so it was rounded to nearest"

# What GPTQ does with weights that AWQ has scaled.
_SWEEP = Gptq(refine_rounds=2)


@dataclass(slots=True)
class BlockResult:
    """weights  packed linears, in the machine's memory
    changed  tensors of the checkpoint that are no longer as they were, by name
    reports  one for each linear, in the plan's order once `sorted_reports` is asked
    """

    weights: dict[Linear, Solution] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[Linear, LayerReport] = field(default_factory=dict)


@dataclass(slots=True)
class Aims:
    """weights    [out, in] that linears are quantized for, where not their own
    steps      what was done to them, for the report
    fallbacks  what could not be done
    """

    keep_all: bool = False
    weights: dict[Linear, Tensor] = field(default_factory=dict)
    steps: dict[Linear, tuple[str, ...]] = field(default_factory=dict)
    fallbacks: dict[Linear, tuple[str, ...]] = field(default_factory=dict)

    def take(
        self,
        capture: BlockCapture,
        index: int,
        linears: Sequence[Linear],
        seen: Moments,
        drift: Drift,
        damping: float,
        *,
        added: bool,
    ) -> None:
        parameters = dict(capture.skeleton.block_parameters(index))
        weights = [linear.matrix(parameters[linear.parameter]).contiguous() for linear in linears]
        for linear, weight in zip(linears, weights, strict=True):
            require_finite(weight, linear)
        corrected = correct(weights, seen, drift, damping=damping, added=added)
        for linear, found in zip(linears, corrected, strict=True):
            if found.share > 0:
                self.weights[linear] = found.weight
                self.steps[linear] = (f"correction {found.share:.2f}",)
            if found.failed:
                self.fallbacks[linear] = (NO_CORRECTION,)


def put_weights(skeleton: Skeleton, index: int, weights: Iterable[tuple[Linear, Tensor]]) -> None:
    """Write linears' weights [out, in] into the loaded block."""
    parameters = dict(skeleton.block_parameters(index))
    with torch.no_grad():
        for linear, values in weights:
            linear.matrix(parameters[linear.parameter]).copy_(values)


def expert_prior(stage: Stage, moments: Mapping[Site, Moments]) -> dict[str, Moments]:
    """For each fused parameter, what its experts saw together."""
    experts: dict[str, list[Moments]] = {}
    for group in stage.groups:
        if group.first.expert is not None:
            experts.setdefault(group.first.parameter, []).append(moments[group.first])
    return {parameter: total(found) for parameter, found in experts.items()}


class Problem(NamedTuple):
    """Linears with one input, and what is known of it.

    hessian     [in, in] of the inputs; None where there were none
    num_tokens  that reached these linears
    scales      [in] what the weights were multiplied by, None for nothing
    """

    linears: Sequence[Linear]
    planned: Mapping[Linear, Scheme]
    hessian: Tensor | None
    num_tokens: int
    notes: tuple[str, ...]
    scales: Tensor | None


def make_problem(
    linears: Sequence[Linear],
    planned: Mapping[Linear, Scheme],
    observed: Moments,
    prior: Moments | None,
    notes: tuple[str, ...] = (),
    scales: Tensor | None = None,
) -> Problem:
    """Uses the moments up. `prior` is what the layer's experts saw together."""
    num_tokens = observed.count
    if prior is not None and num_tokens < observed.gram.shape[0] and prior.count > 0:
        observed = observed.blended(prior)
        notes = (FEW_TOKENS, *notes)
    hessian = observed.take_hessian() if observed.count > 0 else None
    return Problem(linears, planned, hessian, num_tokens, notes, scales)


def solve_group(
    index: int,
    problem: Problem,
    options: Gptq | Awq | SmoothQuant,
    capture: BlockCapture,
    result: BlockResult,
    aims: Aims | None = None,
) -> None:
    """One stacked solve for each scheme."""
    aims = aims or Aims()
    if problem.hessian is None:
        return
    parameters = dict(capture.skeleton.block_parameters(index))
    scales = problem.scales
    unscaled = problem.hessian
    hessian = unscaled if scales is None else unscaled / torch.outer(scales, scales)
    for scheme in dict.fromkeys(problem.planned[linear] for linear in problem.linears):
        started = time.monotonic()
        members = [linear for linear in problem.linears if problem.planned[linear] == scheme]
        weights = [linear.matrix(parameters[linear.parameter]).contiguous() for linear in members]
        for linear, weight in zip(members, weights, strict=True):
            require_finite(weight, linear)
        weights = [
            aims.weights.get(linear, own) for linear, own in zip(members, weights, strict=True)
        ]
        if aims.keep_all:
            aims.weights.update(zip(members, weights, strict=True))
        if isinstance(scheme, FloatScheme):
            assert isinstance(options, Gptq), options
            solved = codebook.solve(torch.cat(weights), hessian, scheme, options)
        elif isinstance(options, Gptq):
            solved = gptq.solve(torch.cat(weights), hessian, scheme, options)
        elif isinstance(options, SmoothQuant):
            solved = rtn.solve(torch.cat(weights), scheme)
        elif options.sweep:
            solved = gptq.solve(torch.cat(weights), hessian, scheme, _SWEEP)
        else:
            solved = awq.solve(torch.cat(weights), hessian, scheme, options)
        parts = split_rows(solved, [weight.shape[0] for weight in weights])
        for linear, weight, part in zip(members, weights, parts, strict=True):
            result.weights[linear] = on(part, CPU)
            # Plain rounding knows nothing of the scales: it is measured on the weight as it was.
            original = weight if scales is None else weight / scales
            plain = row_errors(original, _rounded(original, scheme).dequantized, unscaled)
            lost = part.lost
            if lost is None:
                lost = row_errors(weight, part.dequantized, hessian)
            there = power(original, unscaled)
            result.reports[linear] = LayerReport(
                module=linear.name,
                scheme=str(scheme),
                method=method_name(options),
                error=share(float(lost.double().sum()), there),
                rtn_error=share(float(plain.double().sum()), there),
                num_tokens=problem.num_tokens,
                seconds=round((time.monotonic() - started) / len(members), 3),
                steps=(*aims.steps.get(linear, ()), *_steps(options, scheme)),
                peak_bytes=peak_bytes(),
                device_peak_bytes=device_peak_bytes(capture.device),
                fallbacks=(*aims.fallbacks.get(linear, ()), *part.fallbacks),
                notes=problem.notes,
            )
        put_weights(
            capture.skeleton,
            index,
            zip(members, (part.dequantized for part in parts), strict=True),
        )


def _rounded(weight: Tensor, scheme: Scheme) -> Solution:
    """Plain rounding to as many bits."""
    integers = scheme if isinstance(scheme, QuantScheme) else codebook.as_integers(scheme)
    return rtn.solve(weight, integers)


def _steps(options: Gptq | Awq | SmoothQuant, scheme: Scheme) -> tuple[str, ...]:
    """What the solver was asked to do around its sweep."""
    if isinstance(options, SmoothQuant):
        return ()
    if isinstance(options, Awq):
        if options.sweep:
            return ("gptq", *_steps(_SWEEP, scheme))
        return ("clip search",) if options.clip_search else ()
    steps = ["scale search"] if options.scale_search else []
    if isinstance(scheme, FloatScheme):
        steps = ["k-means"]
    if options.refine_rounds:
        steps.append(f"{options.refine_rounds} rounds of refinement")
    if options.tabu_steps:
        steps.append(f"{options.tabu_steps} steps of tabu search")
    return tuple(steps)


def solve_unseen(
    index: int, planned: Mapping[Linear, Scheme], capture: BlockCapture, result: BlockResult
) -> None:
    """A planned linear without statistics is rounded on a searched grid, and says so."""
    parameters = dict(capture.skeleton.block_parameters(index))
    for linear, scheme in planned.items():
        if linear in result.weights:
            continue
        weight = linear.matrix(parameters[linear.parameter]).contiguous()
        require_finite(weight, linear)
        if isinstance(scheme, FloatScheme):
            solved = codebook.solve(weight, None, scheme, None, (NO_TOKENS,))
        else:
            solved = rtn.solve(weight, scheme, scale_search=True, fallbacks=(NO_TOKENS,))
        result.weights[linear] = on(solved, CPU)
        result.reports[linear] = LayerReport(
            module=linear.name,
            scheme=str(scheme),
            method="rtn",
            error=relative_error(weight, solved.dequantized, None),
            rtn_error=relative_error(weight, _rounded(weight, scheme).dequantized, None),
            num_tokens=0,
            fallbacks=solved.fallbacks,
        )
        put_weights(capture.skeleton, index, [(linear, solved.dequantized)])


def split_rows(solved: Solution, counts: Sequence[int]) -> list[Solution]:
    """Cut a stacked solution back into its linears."""
    parts = []
    start = 0
    for count in counts:
        parts.append(rows(solved, start, start + count))
        start += count
    return parts


def require_finite(weight: Tensor, linear: Linear) -> None:
    bad = int((~torch.isfinite(weight)).sum())
    if bad:
        raise QtoolError(
            f"{linear.tensor} holds {bad} values that are NaN or infinite",
            "the source checkpoint is damaged; fetch it again",
        )


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
