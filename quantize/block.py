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

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from qtool.artifact import LayerReport
from qtool.calibration.capture import BlockCapture
from qtool.calibration.groups import Compared, InputGroup, Stage, stages
from qtool.calibration.linears import Linear, Site, all_linears
from qtool.calibration.originals import Originals
from qtool.calibration.placement import CPU, device_peak_bytes
from qtool.calibration.skeleton import Skeleton
from qtool.calibration.statistics import Moments
from qtool.errors import QtoolError
from qtool.quantize import rtn
from qtool.quantize.group import (
    Aims,
    BlockResult,
    expert_prior,
    make_problem,
    peak_bytes,
    put_weights,
    require_finite,
    solve_group,
    solve_unseen,
)
from qtool.quantize.layouts import Scheme
from qtool.quantize.rounding import round_float
from qtool.quantize.smoothing import smooth
from qtool.quantize.solution import (
    Solution,
    on,
    relative_error,
)
from qtool.quantize.tuning import Start, tune
from qtool.recipe import Awq, Gptq, Recipe, Rtn, SmoothQuant
from qtool.scheme import FloatScheme, QuantScheme


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
            _solve_gptq(index, planned, options, capture, originals, result)
        case Awq() | SmoothQuant() as options:
            assert capture is not None
            _solve_awq(index, integers, options, capture, result)
    return result


def _solve_rtn(
    planned: Mapping[Linear, Scheme], options: Rtn, skeleton: Skeleton, result: BlockResult
) -> None:
    for linear, scheme in planned.items():
        started = time.monotonic()
        device = skeleton.placement.block(linear.block)
        stored = skeleton.checkpoint.tensor(linear.tensor).to(device).to(torch.float32)
        weight = stored.t().contiguous() if linear.transposed else stored
        require_finite(weight, linear)
        if isinstance(scheme, FloatScheme):
            rounded = round_float(weight, scheme)
            solved = plain = Solution(rounded, rounded.dequantize())
        else:
            solved = rtn.solve(weight, scheme, scale_search=options.scale_search)
            plain = solved if not options.scale_search else rtn.solve(weight, scheme)
        result.weights[linear] = on(solved, CPU)
        result.reports[linear] = LayerReport(
            module=linear.name,
            scheme=str(scheme),
            method="rtn",
            error=relative_error(weight, solved.dequantized, None),
            rtn_error=relative_error(weight, plain.dequantized, None),
            seconds=round(time.monotonic() - started, 3),
            steps=("scale search",) if options.scale_search else (),
            peak_bytes=peak_bytes(),
            device_peak_bytes=device_peak_bytes(device),
        )


def _solve_gptq(
    index: int,
    planned: Mapping[Linear, Scheme],
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
    aims = Aims(keep_all=options.tuning_steps > 0)
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
            problem = make_problem(linears, planned, observed, prior.get(group.first.parameter))
            solve_group(index, problem, options, capture, result, aims)
    if originals is not None and options.tuning_steps and capture.has_held_out:
        _tune(index, options, capture, originals, aims, result)
    solve_unseen(index, planned, capture, result)


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
    aims: Aims,
    result: BlockResult,
) -> None:
    """Gradient steps on the solved block."""
    started = time.monotonic()
    starts = {
        linear: Start(on(solved, capture.device), aims.weights[linear])
        for linear, solved in result.weights.items()
    }
    if not starts:
        return
    tuned = tune(capture, originals, starts, steps=options.tuning_steps)
    step = f"tuning, block error {tuned.before:.3g} -> {tuned.after:.3g}"
    seconds = (time.monotonic() - started) / len(starts)
    for linear, solved in tuned.solutions.items():
        report = result.reports[linear]
        steps = report.steps if tuned.after == tuned.before else (*report.steps, step)
        result.weights[linear] = on(solved, CPU)
        result.reports[linear] = replace(
            report,
            steps=steps,
            seconds=round((report.seconds or 0.0) + seconds, 3),
            peak_bytes=peak_bytes(),
            device_peak_bytes=device_peak_bytes(capture.device),
        )
    dequantized = ((linear, solved.dequantized) for linear, solved in tuned.solutions.items())
    put_weights(capture.skeleton, index, dequantized)
    capture.forget_attention()


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
        all_linears=all_linears(capture.skeleton, index),
        options=options,
        run=capture.first_output,
    )
    result.changed.update(smoothed.changed)
    for group in groups:
        linears = [linear for site in group.sites for linear in at_site.get(site, [])]
        observed = moments.pop(group.first)
        problem = make_problem(
            linears,
            planned,
            observed,
            prior.get(group.first.parameter),
            smoothed.notes.get(group.first, ()),
            smoothed.scales.get(group.first),
        )
        solve_group(index, problem, options, capture, result)
    solve_unseen(index, planned, capture, result)


def _traced(
    index: int, planned: Mapping[Linear, Scheme], capture: BlockCapture
) -> list[InputGroup]:
    """Groups that hold a planned linear; consumers that stay dense are listed in them too."""
    sites = dict.fromkeys(linear.site for linear in all_linears(capture.skeleton, index))
    groups = capture.trace(sites)
    wanted = {linear.site for linear in planned}
    return [group for group in groups if wanted & set(group.sites)]


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
    widths = {linear.site: linear.in_features for linear in all_linears(capture.skeleton, index)}
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
