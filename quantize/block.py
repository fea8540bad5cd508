"""Quantize one decoder block: take its statistics, solve its linears, leave it dequantized.

Each method is one function from a loaded block to a BlockResult. GPTQ takes a pass over the
calibration chunks for every set of linears that share an input, in the order in which the block
feeds them, so that each Hessian is that of the inputs the layer will really get, with all before
it, in this block too, already quantized. The passes are short: each ends where its inputs have been
seen, and all of them together cost about one and a half times the block's forward pass. AWQ moves
scale between layers, so it takes all statistics in one pass first, and so does GPTQ in haste.

Where the original model is followed, each linear is aimed at what it lacks (correction.py), and the
solved block may be tuned as a whole (tuning.py). Experts are not aimed: they are fed by another
choice of tokens in the two streams.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.artifact import LayerReport
from qtool.calibration.capture import BlockCapture, Compared, InputGroup, Stage, stages
from qtool.calibration.linears import Linear, Site, Unpacked, block_linears
from qtool.calibration.originals import Originals
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Drift, Moments, total
from qtool.errors import QtoolError
from qtool.quantize import awq, gptq, rtn
from qtool.quantize.correction import correct
from qtool.quantize.layouts import Scheme
from qtool.quantize.rounding import round_float
from qtool.quantize.smoothing import smooth
from qtool.quantize.solution import (
    Solution,
    power,
    relative_error,
    row_errors,
    rows,
    share,
)
from qtool.quantize.tuning import Start, tune
from qtool.recipe import Awq, Gptq, Recipe, Rtn, SmoothQuant, method_name
from qtool.scheme import FloatScheme, QuantScheme

FEW_TOKENS = "fewer tokens than inputs reached this expert, so the layer's other experts fill in"
NO_CORRECTION = "its correction could not be computed, so it was quantized as it was"
NO_TOKENS = "no calibration token reached it, so it was rounded to nearest"


# What GPTQ does with weights that AWQ has scaled.
_SWEEP = Gptq(refine_rounds=2)


@dataclass(slots=True)
class BlockResult:
    """weights  packed linears
    changed  tensors of the checkpoint that are no longer as they were, by name
    reports  one for each linear, in the plan's order once `sorted_reports` is asked
    """

    weights: dict[Linear, Solution] = field(default_factory=dict)
    changed: dict[str, Tensor] = field(default_factory=dict)
    reports: dict[Linear, LayerReport] = field(default_factory=dict)


def solve_block(
    index: int,
    planned: Mapping[Linear, Scheme],
    recipe: Recipe,
    skeleton: Skeleton,
    capture: BlockCapture | None,
    originals: Originals | None = None,
) -> BlockResult:
    """Solve a block's planned linears.

    With calibration the block must be loaded; its parameters are left as the packed weights decode.
    `originals` stands before the block, and is left behind it.
    """
    result = BlockResult()
    if not planned:
        if originals is not None:
            originals.record(index, ())
        return result
    integers = {
        linear: scheme for linear, scheme in planned.items() if isinstance(scheme, QuantScheme)
    }
    match recipe.method:
        case Rtn() as options:
            _solve_rtn(planned, options, skeleton, result)
        case Gptq() as options:
            assert capture is not None
            _solve_gptq(index, integers, options, capture, originals, result)
        case Awq() | SmoothQuant() as options:
            assert capture is not None
            _solve_awq(index, integers, options, capture, result)
    return result


def put_weights(skeleton: Skeleton, index: int, weights: Iterable[tuple[Linear, Tensor]]) -> None:
    """Write linears' weights [out, in] into the loaded block."""
    parameters = dict(skeleton.block_parameters(index))
    with torch.no_grad():
        for linear, values in weights:
            linear.matrix(parameters[linear.parameter]).copy_(values)


def _solve_rtn(
    planned: Mapping[Linear, Scheme], options: Rtn, skeleton: Skeleton, result: BlockResult
) -> None:
    for linear, scheme in planned.items():
        started = time.monotonic()
        stored = skeleton.checkpoint.tensor(linear.tensor).to(torch.float32)
        weight = stored.t().contiguous() if linear.transposed else stored
        require_finite(weight, linear)
        if isinstance(scheme, FloatScheme):
            rounded = round_float(weight, scheme)
            solved = plain = Solution(rounded, rounded.dequantize())
        else:
            solved = rtn.solve(weight, scheme, scale_search=options.scale_search)
            plain = solved if not options.scale_search else rtn.solve(weight, scheme)
        result.weights[linear] = solved
        result.reports[linear] = LayerReport(
            module=linear.name,
            scheme=str(scheme),
            method="rtn",
            error=relative_error(weight, solved.dequantized, None),
            rtn_error=relative_error(weight, plain.dequantized, None),
            seconds=round(time.monotonic() - started, 3),
            steps=("scale search",) if options.scale_search else (),
            peak_bytes=peak_bytes(),
        )


def _solve_gptq(
    index: int,
    planned: Mapping[Linear, QuantScheme],
    options: Gptq,
    capture: BlockCapture,
    originals: Originals | None,
    result: BlockResult,
) -> None:
    groups = _traced(index, planned, capture)
    at_site = _by_site(planned)
    compared: dict[Site, Compared] = {}
    if originals is not None:
        if options.correction and capture.has_held_out:
            compared = capture.compared(groups, _whole_parameters(index, at_site, capture))
        originals.record(index, [place.point for place in compared.values()], capture.recorded)
    aims = _Aims(keep_all=options.tuning_steps > 0)
    for stage in stages(groups, sequential=options.sequential):
        group = stage.groups[0]
        place = compared.get(group.first) if len(stage.groups) == 1 else None
        if place is not None and originals is not None:
            linears = [linear for site in group.sites for linear in at_site.get(site, [])]
            width = linears[0].in_features
            pending = {linear.site for linear in planned if linear not in result.weights}
            seen, drift = capture.collect_compared(group, place, originals, width, pending)
            del compared[group.first]
            if all(other.point != place.point for other in compared.values()):
                originals.drop(place.point)
            _require_finite_inputs(group.first, seen)
            aims.take(capture, index, linears, seen, drift, options.damping, added=place.added)
            moments = {group.first: seen}
        else:
            moments = _collected(index, stage, planned, capture, result)
        prior = expert_prior(stage, moments)
        for group in stage.groups:
            linears = [linear for site in group.sites for linear in at_site.get(site, [])]
            observed = moments.pop(group.first)
            problem = _problem(linears, planned, observed, prior.get(group.first.parameter))
            _solve_group(index, problem, options, capture, result, aims)
    if originals is not None and options.tuning_steps and capture.has_held_out:
        _tune(index, options, capture, originals, aims, result)
    _solve_unseen(index, planned, capture, result)


@dataclass(slots=True)
class _Aims:
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


def _whole_parameters(
    index: int, at_site: Mapping[Site, Sequence[Linear]], capture: BlockCapture
) -> dict[Site, Tensor]:
    """Views [out, in] of the linears that are all of their parameter."""
    parameters = dict(capture.skeleton.block_parameters(index))
    found = {}
    for site, linears in at_site.items():
        matrix = linears[0].matrix(parameters[site.parameter])
        if len(linears) == 1 and matrix.numel() == parameters[site.parameter].numel():
            found[site] = matrix
    return found


def _tune(
    index: int,
    options: Gptq,
    capture: BlockCapture,
    originals: Originals,
    aims: _Aims,
    result: BlockResult,
) -> None:
    """Gradient steps on the solved block."""
    started = time.monotonic()
    starts = {
        linear: Start(solved, aims.weights[linear]) for linear, solved in result.weights.items()
    }
    if not starts:
        return
    tuned = tune(capture, originals, starts, steps=options.tuning_steps)
    step = f"tuning, block error {tuned.before:.3g} -> {tuned.after:.3g}"
    seconds = (time.monotonic() - started) / len(starts)
    for linear, solved in tuned.solutions.items():
        report = result.reports[linear]
        steps = report.steps if tuned.after == tuned.before else (*report.steps, step)
        result.weights[linear] = solved
        result.reports[linear] = replace(
            report,
            steps=steps,
            seconds=round((report.seconds or 0.0) + seconds, 3),
            peak_bytes=peak_bytes(),
        )
    dequantized = ((linear, solved.dequantized) for linear, solved in tuned.solutions.items())
    put_weights(capture.skeleton, index, dequantized)


def peak_bytes() -> int:
    """The most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _solve_awq(
    index: int,
    planned: Mapping[Linear, QuantScheme],
    options: Awq | SmoothQuant,
    capture: BlockCapture,
    result: BlockResult,
) -> None:
    groups = _traced(index, planned, capture)
    (stage,) = stages(groups, sequential=False) or [Stage(())]
    moments = _collected(index, stage, planned, capture, result)
    prior = expert_prior(stage, moments)
    at_site = _by_site(planned)
    smoothed = smooth(
        capture.skeleton,
        index,
        groups=groups,
        moments=moments,
        planned=planned,
        all_linears=_all_linears(capture.skeleton, index),
        options=options,
        run=capture.first_output,
    )
    result.changed.update(smoothed.changed)
    for group in groups:
        linears = [linear for site in group.sites for linear in at_site.get(site, [])]
        observed = moments.pop(group.first)
        problem = _problem(
            linears,
            planned,
            observed,
            prior.get(group.first.parameter),
            smoothed.notes.get(group.first, ()),
            smoothed.scales.get(group.first),
        )
        _solve_group(index, problem, options, capture, result)
    _solve_unseen(index, planned, capture, result)


def _traced(
    index: int, planned: Mapping[Linear, QuantScheme], capture: BlockCapture
) -> list[InputGroup]:
    """Groups that hold a planned linear; consumers that stay dense are listed in them too."""
    sites = dict.fromkeys(linear.site for linear in _all_linears(capture.skeleton, index))
    groups = capture.trace(sites)
    wanted = {linear.site for linear in planned}
    return [group for group in groups if wanted & set(group.sites)]


def _all_linears(skeleton: Skeleton, index: int) -> list[Linear]:
    return [item for item in block_linears(skeleton, index) if not isinstance(item, Unpacked)]


def _by_site(planned: Iterable[Linear]) -> dict[Site, list[Linear]]:
    found: dict[Site, list[Linear]] = {}
    for linear in planned:
        found.setdefault(linear.site, []).append(linear)
    return found


def _collected(
    index: int,
    stage: Stage,
    planned: Iterable[Linear],
    capture: BlockCapture,
    result: BlockResult,
) -> dict[Site, Moments]:
    widths = {linear.site: linear.in_features for linear in _all_linears(capture.skeleton, index)}
    pending = {linear.site for linear in planned if linear not in result.weights}
    moments = capture.collect(stage, widths.__getitem__, pending)
    for site, found in moments.items():
        _require_finite_inputs(site, found)
    return moments


def _require_finite_inputs(site: Site, seen: Moments) -> None:
    if not seen.is_finite:
        raise QtoolError(
            f"the inputs of {site.parameter} are not finite",
            "the checkpoint holds NaN or infinite weights, or overflows on this text",
        )


def expert_prior(stage: Stage, moments: Mapping[Site, Moments]) -> dict[str, Moments]:
    """For each fused parameter, what its experts saw together."""
    experts: dict[str, list[Moments]] = {}
    for group in stage.groups:
        if group.first.expert is not None:
            experts.setdefault(group.first.parameter, []).append(moments[group.first])
    return {parameter: total(found) for parameter, found in experts.items()}


class _Problem(NamedTuple):
    """Linears with one input, and what is known of it.

    hessian     [in, in] of the inputs; None where there were none
    num_tokens  that reached these linears
    scales      [in] what the weights were multiplied by, None for nothing
    """

    linears: Sequence[Linear]
    planned: Mapping[Linear, QuantScheme]
    hessian: Tensor | None
    num_tokens: int
    notes: tuple[str, ...]
    scales: Tensor | None


def _problem(
    linears: Sequence[Linear],
    planned: Mapping[Linear, QuantScheme],
    observed: Moments,
    prior: Moments | None,
    notes: tuple[str, ...] = (),
    scales: Tensor | None = None,
) -> _Problem:
    """Uses the moments up. `prior` is what the layer's experts saw together."""
    num_tokens = observed.count
    if prior is not None and num_tokens < observed.gram.shape[0] and prior.count > 0:
        observed = observed.blended(prior)
        notes = (FEW_TOKENS, *notes)
    hessian = observed.take_hessian() if observed.count > 0 else None
    return _Problem(linears, planned, hessian, num_tokens, notes, scales)


def _solve_group(
    index: int,
    problem: _Problem,
    options: Gptq | Awq | SmoothQuant,
    capture: BlockCapture,
    result: BlockResult,
    aims: _Aims | None = None,
) -> None:
    """One stacked solve for each scheme."""
    aims = aims or _Aims()
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
        if isinstance(options, Gptq):
            solved = gptq.solve(torch.cat(weights), hessian, scheme, options)
        elif isinstance(options, SmoothQuant):
            solved = rtn.solve(torch.cat(weights), scheme)
        elif options.sweep:
            solved = gptq.solve(torch.cat(weights), hessian, scheme, _SWEEP)
        else:
            solved = awq.solve(torch.cat(weights), hessian, scheme, options)
        parts = split_rows(solved, [weight.shape[0] for weight in weights])
        for linear, weight, part in zip(members, weights, parts, strict=True):
            result.weights[linear] = part
            # Plain rounding knows nothing of the scales: it is measured on the weight as it was.
            original = weight if scales is None else weight / scales
            plain = row_errors(original, rtn.solve(original, scheme).dequantized, unscaled)
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
                steps=(*aims.steps.get(linear, ()), *_steps(options)),
                peak_bytes=peak_bytes(),
                fallbacks=(*aims.fallbacks.get(linear, ()), *part.fallbacks),
                notes=problem.notes,
            )
        put_weights(
            capture.skeleton,
            index,
            zip(members, (part.dequantized for part in parts), strict=True),
        )


def _steps(options: Gptq | Awq | SmoothQuant) -> tuple[str, ...]:
    """What the solver was asked to do around its sweep."""
    if isinstance(options, SmoothQuant):
        return ()
    if isinstance(options, Awq):
        if options.sweep:
            return ("gptq", *_steps(_SWEEP))
        return ("clip search",) if options.clip_search else ()
    steps = ["scale search"] if options.scale_search else []
    if options.refine_rounds:
        steps.append(f"{options.refine_rounds} rounds of refinement")
    if options.orders > 1:
        steps.append(f"{options.orders} sweeps' best rows")
    return tuple(steps)


def _solve_unseen(
    index: int, planned: Mapping[Linear, QuantScheme], capture: BlockCapture, result: BlockResult
) -> None:
    """A planned linear without statistics is rounded on a searched grid, and says so."""
    parameters = dict(capture.skeleton.block_parameters(index))
    for linear, scheme in planned.items():
        if linear in result.weights:
            continue
        weight = linear.matrix(parameters[linear.parameter]).contiguous()
        require_finite(weight, linear)
        solved = rtn.solve(weight, scheme, scale_search=True, fallbacks=(NO_TOKENS,))
        result.weights[linear] = solved
        result.reports[linear] = LayerReport(
            module=linear.name,
            scheme=str(scheme),
            method="rtn",
            error=relative_error(weight, solved.dequantized, None),
            rtn_error=relative_error(weight, rtn.solve(weight, scheme).dequantized, None),
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
