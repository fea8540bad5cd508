"""Gradient steps on a whole block's codes and scales, against the original model's output.

The solvers see one linear at a time. This sees the block: its output for the quantized stream's
hidden states is brought nearer to the original stream's, by steps on

    u   for every weight a place on the grid, weight = clamp(round(u)) * s; gradients pass through
        the rounding as if it were not there (straight-through)
    s   every scale, rounded to what the file stores whenever it is used

as AutoRound does (arXiv 2309.05516), which starts from plain rounding; here u starts at the solved
codes. Steps are signs of gradients with a rate that falls to zero: a code moves where gradients
agree over many steps, and noise cancels.

Chunks that are held out take no part in the steps. The block's error on them is taken a few times
on the way, and the best state wins, the first included: what does not hold on other text is not
kept. Everything is seeded by the block's number, so a run that is resumed makes the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qtool.calibration.capture import BlockCapture
from qtool.calibration.linears import Linear
from qtool.calibration.originals import OUTPUT, Originals
from qtool.grid import Grid, grouped, round_scales
from qtool.quantize.solution import Solution, from_codes

# How far all steps together can take a place, in codes, and a scale, as a share of itself. Solved
# codes sit where no single one should move, so only those that nearly went the other way may: with
# a reach of 0.5, as AutoRound has from plain rounding, the held-out error of a solved block rose by
# a third in 40 steps and did not come back (books-7m, 3 bits, block 0). On block 1, solved by tabu
# search: 0.05 and 0.05 for 64 steps left 0.998 of the error, 0.1 and 0.02 for 32 left 0.990, 0.2
# and 0.02 for 96 left 0.986.
_CODE_REACH = 0.1
_SCALE_REACH = 0.02
# Tokens of one step, and of a look at the held-out chunks.
_STEP_TOKENS = 2048
_HELD_OUT_TOKENS = 8192
_LOOKS = 8
# How much of the distance to the target weight a code's place starts with, so that codes near a
# boundary cross it first.
_LEAN = 0.9


class Tuned(NamedTuple):
    """solutions  of every linear that was given
    before      the block's held-out error as a share of its output's power, and
    after       with these solutions; equal where nothing better was found
    """

    solutions: dict[Linear, Solution]
    before: float
    after: float


class Start(NamedTuple):
    """A solved linear, and the weight [out, in] that it was solved for."""

    solution: Solution
    target: Tensor


def tune(
    capture: BlockCapture, originals: Originals, starts: Mapping[Linear, Start], *, steps: int
) -> Tuned:
    """Better solutions for a block's linears, or the same ones."""
    places = {linear: _Place.of(start) for linear, start in starts.items()}
    held_out = _HeldOut.of(capture, originals)
    best = {linear: place.copy() for linear, place in places.items()}
    before = lowest = held_out.error(capture, originals, places)
    draws = _draws(capture, steps)
    looks = {steps * (look + 1) // _LOOKS for look in range(_LOOKS)}
    for step, (chunk, sequences) in enumerate(draws):
        rate = 2.0 * (1.0 - step / steps) / steps
        weights = capture.weights({linear: place.weight() for linear, place in places.items()})
        output = capture.output(chunk, sequences, weights)
        loss = (output - originals.at(OUTPUT, chunk)[sequences]).square().mean()
        loss.backward()  # type: ignore[no-untyped-call]
        for place in places.values():
            place.move(rate)
        if step + 1 in looks:
            error = held_out.error(capture, originals, places)
            if error < lowest:
                lowest = error
                best = {linear: place.copy() for linear, place in places.items()}
    if lowest >= before:
        return Tuned({linear: start.solution for linear, start in starts.items()}, before, before)
    found = {linear: place.solution(starts[linear].solution) for linear, place in best.items()}
    return Tuned(found, before, lowest)


class _Round(torch.autograd.Function):
    """weight [out, groups, width] from places of that shape, and scales [out, groups]."""

    @staticmethod
    def forward(
        context: Any, places: Tensor, scales: Tensor, lowest: Tensor, highest: Tensor
    ) -> Tensor:
        stored = round_scales(scales).unsqueeze(-1)
        codes = torch.round(places)
        inside = (codes >= lowest) & (codes <= highest)
        codes = torch.minimum(torch.maximum(codes, lowest), highest)
        context.save_for_backward(codes, stored, inside)
        return codes * stored

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        codes, stored, inside = context.saved_tensors
        (gradient,) = gradients
        return gradient * stored * inside, (gradient * codes).sum(-1), None, None


@dataclass(slots=True)
class _Place:
    """One linear on its way: places [out, groups, width] in codes counted from zero, scales
    [out, groups] and the lowest and highest code [out, groups, 1].
    """

    places: Tensor
    scales: Tensor
    lowest: Tensor
    highest: Tensor

    @classmethod
    def of(cls, start: Start) -> _Place:
        weight = start.solution.integers
        scheme = weight.scheme
        zeros = torch.full_like(weight.scales, float(scheme.midpoint))
        if weight.zeros is not None:
            zeros = weight.zeros.to(torch.float32)
        zeros = zeros.unsqueeze(-1)
        codes = grouped(weight.codes, scheme).to(torch.float32) - zeros
        exact = grouped(start.target, scheme) / weight.scales.unsqueeze(-1)
        lean = _LEAN * (exact - codes).clamp(-0.5, 0.5)
        places = (codes + lean).requires_grad_(True)
        scales = weight.scales.to(torch.float32).clone().requires_grad_(True)
        return cls(places, scales, -zeros, scheme.num_codes - 1 - zeros)

    def weight(self) -> Tensor:
        """[out, in] float32, with gradients."""
        rounded: Tensor = _Round.apply(  # type: ignore[no-untyped-call]
            self.places, self.scales, self.lowest, self.highest
        )
        return rounded.flatten(1)

    def move(self, rate: float) -> None:
        """One step along the signs of the gradients, which are used up."""
        with torch.no_grad():
            if self.places.grad is not None:
                self.places.sub_(self.places.grad.sign_(), alpha=rate * _CODE_REACH)
            if self.scales.grad is not None:
                step = self.scales.grad.sign_().mul_(self.scales.abs())
                self.scales.sub_(step, alpha=rate * _SCALE_REACH)
        self.places.grad = self.scales.grad = None

    def copy(self) -> _Place:
        return _Place(
            self.places.detach().clone(), self.scales.detach().clone(), self.lowest, self.highest
        )

    def solution(self, solved: Solution) -> Solution:
        """As it is stored."""
        scheme = solved.integers.scheme
        steps = torch.minimum(torch.maximum(torch.round(self.places), self.lowest), self.highest)
        codes = (steps - self.lowest).flatten(1).to(torch.uint8)
        zeros = solved.integers.zeros
        found = Grid(round_scales(self.scales), None if zeros is None else zeros.to(torch.float32))
        return from_codes(codes, found, scheme, solved.fallbacks)


@dataclass(frozen=True, slots=True)
class _HeldOut:
    """parts  chunks and the sequences of them that are looked at
    power  of the original stream's output there
    """

    parts: tuple[tuple[int, slice], ...]
    power: float

    @classmethod
    def of(cls, capture: BlockCapture, originals: Originals) -> _HeldOut:
        chunks = [chunk for chunk in range(capture.num_chunks) if capture.is_held_out(chunk)]
        length = capture.sequence_length
        each = max(1, _HELD_OUT_TOKENS // (length * len(chunks)))
        parts = tuple((chunk, slice(0, each)) for chunk in chunks)
        power = sum(
            float(originals.at(OUTPUT, chunk)[part].double().square().sum())
            for chunk, part in parts
        )
        return cls(parts, power)

    def error(
        self, capture: BlockCapture, originals: Originals, places: Mapping[Linear, _Place]
    ) -> float:
        """The squared difference of the streams as a share of the power."""
        with torch.no_grad():
            weights = capture.weights({linear: place.weight() for linear, place in places.items()})
        lost = 0.0
        for chunk, part in self.parts:
            output = capture.output(chunk, part, weights)
            lost += float((output - originals.at(OUTPUT, chunk)[part]).double().square().sum())
        return lost / self.power if self.power > 0 else lost


def _draws(capture: BlockCapture, steps: int) -> list[tuple[int, slice]]:
    """What each step looks at: every part of the data that is not held out once, then again."""
    size = max(1, _STEP_TOKENS // capture.sequence_length)
    parts = [
        (chunk, slice(start, start + size))
        for chunk in range(capture.num_chunks)
        if not capture.is_held_out(chunk)
        for start in range(0, capture.num_sequences(chunk), size)
    ]
    generator = torch.Generator().manual_seed(capture.index)
    order: list[int] = []
    while len(order) < steps:
        order += torch.randperm(len(parts), generator=generator).tolist()
    return [parts[number] for number in order[:steps]]
