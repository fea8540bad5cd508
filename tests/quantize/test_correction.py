"""Aiming a linear at the original stream: exact where it can be, nothing where it does not hold."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.calibration.statistics import Drift, Moments
from qtool.calibration.sums import DriftSums, MomentSums
from qtool.quantize.correction import correct

ROWS, COLUMNS = 6, 16


def seen(inputs: Tensor, difference: Tensor, held_out: int) -> tuple[Moments, Drift]:
    """The last `held_out` vectors are held out."""
    sums = MomentSums.zeros(COLUMNS)
    drift = DriftSums.zeros(difference.shape[1], COLUMNS)
    cut = inputs.shape[0] - held_out
    for part, held in ((slice(0, cut), False), (slice(cut, None), True)):
        sums.add(inputs[part])
        drift.add(difference[part], inputs[part], held_out=held)
    return sums.moments(), drift.drift()


@pytest.fixture
def inputs() -> Tensor:
    return torch.randn(400, COLUMNS, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("added", [True, False], ids=["outputs", "inputs"])
def test_a_difference_that_is_linear_in_the_inputs_is_taken_back_whole(
    inputs: Tensor, added: bool
) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    mixing = torch.eye(COLUMNS) + 0.1 * torch.randn(COLUMNS, COLUMNS, generator=generator)
    originals = inputs @ mixing.t()
    difference = originals - inputs
    given = difference @ weight.t() if added else difference
    (found,) = correct([weight], *seen(inputs, given, 100), damping=1e-6, added=added)
    assert found.share == pytest.approx(1.0, abs=1e-3)
    assert torch.allclose(found.weight, weight @ mixing, atol=1e-3)


def test_noise_moves_nothing_that_matters(inputs: Tensor) -> None:
    """What is learned from few vectors is noise, and the many that decide show it."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    noise = torch.randn(400, ROWS, generator=generator)
    (found,) = correct([weight], *seen(inputs, noise, 370), damping=0.01, added=True)
    assert found.share < 0.1
    (kept,) = correct([weight], *seen(inputs, 0 * noise, 100), damping=0.01, added=True)
    assert kept.share == 0.0
    assert kept.weight is weight


def test_linears_that_share_an_input_decide_by_themselves(inputs: Tensor) -> None:
    generator = torch.Generator().manual_seed(3)
    weights = [torch.randn(ROWS, COLUMNS, generator=generator) for _ in range(2)]
    change = 0.1 * torch.randn(ROWS, COLUMNS, generator=generator)
    good = inputs @ change.t()
    turned = good.clone()
    turned[300:] *= -1  # what was learned holds nowhere else
    drifts = torch.cat([good, turned], 1)
    first, second = correct(weights, *seen(inputs, drifts, 100), damping=1e-6, added=True)
    assert torch.allclose(first.weight, weights[0] + change, atol=1e-3)
    assert second.share == 0.0
    assert second.weight is weights[1]


def test_without_held_out_vectors_nothing_is_corrected(inputs: Tensor) -> None:
    weight = torch.ones(ROWS, COLUMNS)
    (found,) = correct([weight], *seen(inputs, inputs[:, :ROWS], 0), damping=0.01, added=True)
    assert found.share == 0.0


def test_a_correction_that_cannot_be_computed_is_not_made_and_said(inputs: Tensor) -> None:
    weight = torch.ones(ROWS, COLUMNS)
    moments, drift = seen(inputs, inputs[:, :ROWS], 100)
    drift.cross[0, 0] = float("inf")
    (found,) = correct([weight], moments, drift, damping=0.01, added=True)
    assert found.failed
    assert found.weight is weight
