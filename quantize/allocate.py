"""Mixed widths: give each linear the bits that lower the model's loss most for their size.

What a linear loses at a width is estimated from the inputs of the original model alone, as the
share of its output's power,

    sum_k E[x_k²] (w_k - q_k)² / sum_k E[x_k²] w_k²        q plain rounding at that width

and summed over the linears. Those that runtimes fuse (q, k, v; gate and up; the experts of a block)
get one width together. Sizes count codes and scales.

The choice is a knapsack. Of each set's widths only those on the lower convex hull of loss over size
can be best for some price a bit; steps along all hulls are taken in the order of loss saved a bit,
while they fit. That is within one step of the optimum, and a step is one set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qtool.calibration.importance import InputSquares, input_squares
from qtool.calibration.linears import Linear
from qtool.calibration.skeleton import Skeleton
from qtool.errors import UsageError
from qtool.quantize import rtn
from qtool.quantize.plan import Plan
from qtool.scheme import QuantScheme
from qtool.units import size_text

WIDTHS = (2, 3, 4, 5, 6, 8)
# Runtimes run these as one matrix.
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


@dataclass(frozen=True, slots=True)
class Target:
    """bits   stored bits a weight, over all linears that are quantized, or
    bytes  of the whole artifact
    """

    bits: float | None = None
    bytes: int | None = None

    def __post_init__(self) -> None:
        if (self.bits is None) == (self.bytes is None):
            raise UsageError("give --target-bits or --target-size, not both")

    def budget(self, plan: Plan) -> float:
        """Bits for all quantized linears."""
        weights = sum(linear.out_features * linear.in_features for linear in plan.quantized)
        if self.bits is not None:
            return self.bits * weights
        assert self.bytes is not None
        now = sum(_stored_bits(linear, scheme) for linear, scheme in _integers(plan).items())
        return 8 * (self.bytes - plan.output_bytes) + now


class Option(NamedTuple):
    """One width of a set: its size in bits, and what is lost with it."""

    width: int
    size: float
    loss: float


def choose(sets: Sequence[Sequence[Option]], budget: float) -> list[Option] | None:
    """One option of each set, together no larger than the budget; None where nothing fits."""
    hulls = [_hull(options) for options in sets]
    places = [0] * len(hulls)
    size = sum(hull[0].size for hull in hulls)
    if size > budget:
        return None
    steps = []
    for number, hull in enumerate(hulls):
        for place in range(1, len(hull)):
            before, after = hull[place - 1], hull[place]
            saved = (before.loss - after.loss) / (after.size - before.size)
            steps.append((-saved, number, place))
    for _, number, place in sorted(steps):
        grows = hulls[number][place].size - hulls[number][places[number]].size
        # Along a hull steps save less and less, so they come in order; past one that did not fit
        # the next may be small enough from where the set stands.
        if size + grows <= budget:
            places[number] = place
            size += grows
    return [hull[place] for hull, place in zip(hulls, places, strict=True)]


def _hull(options: Iterable[Option]) -> list[Option]:
    """Those on the lower convex hull, by growing size."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], option) <= _slope(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _slope(first: Option, second: Option) -> float:
    return (second.loss - first.loss) / (second.size - first.size)


def require_reachable(plan: Plan, target: Target) -> None:
    """By arithmetic alone, before anything is measured: UsageError where the narrowest widths are
    too large.
    """
    now, least = 0.0, 0.0
    for linear, scheme in _integers(plan).items():
        now += _stored_bits(linear, scheme)
        narrow = (_resized(scheme, width) for width in WIDTHS)
        least += min(_stored_bits(linear, each) for each in narrow)
    if least <= target.budget(plan):
        return
    narrowest = f"{WIDTHS[0]} bits for every layer"
    if target.bytes is not None:
        smallest = int(plan.output_bytes + (least - now) / 8)
        raise UsageError(
            f"--target-size of {size_text(target.bytes)}: the whole artifact takes "
            f"{size_text(smallest)} in {narrowest}",
            f"raise it to {smallest} or more",
        )
    weights = sum(linear.out_features * linear.in_features for linear in plan.quantized)
    raise UsageError(
        f"--target-bits {target.bits:g} is smaller than {narrowest}, "
        f"{least / weights:.3f} a weight with scales",
        f"raise it to {least / weights:.3f} or more",
    )


def mixed_plan(skeleton: Skeleton, plan: Plan, target: Target, tokens: Tensor) -> Plan:
    """The plan with widths chosen for a target. UsageError where no widths reach it.

    tokens  [sequences, length] int64
    """
    require_reachable(plan, target)
    squares = input_squares(skeleton, tokens)
    sets = _tied(_integers(plan))
    options = [_options(skeleton, members, squares) for members in sets]
    chosen = choose(options, target.budget(plan))
    assert chosen is not None, "the narrowest widths are within the budget"
    widths = {
        linear: option.width
        for members, option in zip(sets, chosen, strict=True)
        for linear in members
    }
    quantized = {
        linear: _resized(scheme, widths[linear]) for linear, scheme in _integers(plan).items()
    }
    before = sum(_stored_bits(linear, scheme) for linear, scheme in _integers(plan).items())
    after = sum(_stored_bits(linear, scheme) for linear, scheme in quantized.items())
    output_bytes = plan.output_bytes + int((after - before) / 8)
    return replace(plan, quantized=quantized, output_bytes=output_bytes)


def average_bits(plan: Plan) -> float:
    """Stored bits a weight over the quantized linears."""
    weights = sum(linear.out_features * linear.in_features for linear in plan.quantized)
    return sum(_stored_bits(linear, s) for linear, s in _integers(plan).items()) / weights


def _integers(plan: Plan) -> dict[Linear, QuantScheme]:
    return {
        linear: scheme
        for linear, scheme in plan.quantized.items()
        if isinstance(scheme, QuantScheme)
    }


def _resized(scheme: QuantScheme, width: int) -> QuantScheme:
    return QuantScheme(width, scheme.group_size, scheme.symmetric)


def _stored_bits(linear: Linear, scheme: QuantScheme) -> float:
    weights = linear.out_features * linear.in_features
    return weights * scheme.bits_per_weight(linear.in_features)


def _tied(quantized: Mapping[Linear, QuantScheme]) -> list[dict[Linear, QuantScheme]]:
    sets: dict[tuple[object, ...], dict[Linear, QuantScheme]] = {}
    for linear, scheme in quantized.items():
        parent, _, leaf = linear.name.rpartition(".")
        fused = next((members for members in _FUSED if leaf in members), None)
        if linear.expert is not None or ".experts." in linear.name:
            key: tuple[object, ...] = (linear.block, "experts")
        else:
            key = (parent, fused or leaf)
        sets.setdefault(key, {})[linear] = scheme
    return list(sets.values())


def _options(
    skeleton: Skeleton,
    members: Mapping[Linear, QuantScheme],
    squares: Mapping[str, InputSquares],
) -> list[Option]:
    sizes = dict.fromkeys(WIDTHS, 0.0)
    losses = dict.fromkeys(WIDTHS, 0.0)
    for linear, scheme in members.items():
        stored = skeleton.checkpoint.tensor(linear.tensor).to(torch.float32)
        weight = stored.t().contiguous() if linear.transposed else stored
        seen = squares.get(linear.name)
        importance = torch.ones(weight.shape[1])
        if seen is not None and seen.count > 0:
            importance = seen.sums / seen.count
        power = float((weight.square() @ importance).double().sum())
        for width in WIDTHS:
            tried = _resized(scheme, width)
            difference = weight - rtn.solve(weight, tried).dequantized
            lost = float((difference.square() @ importance).double().sum())
            losses[width] += lost / power if power > 0 else 0.0
            sizes[width] += _stored_bits(linear, tried)
    return [Option(width, sizes[width], losses[width]) for width in WIDTHS]
