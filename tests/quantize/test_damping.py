"""Moments that do not factor at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qtool.quantize.damping import factored

EXACT = torch.diag(torch.tensor([4.0, 1.0, 0.25]))


def inverse(lower: Tensor) -> Tensor:
    return torch.cholesky_inverse(lower)


def test_by_hand() -> None:
    """The mean diagonal is 1.75; 4 + 0.1 * 1.75 = 4.175."""
    found = factored(EXACT, 0.1, inverse)
    assert found is not None
    assert found.share == 0.1
    assert not found.in_float64
    assert float(found.result[0, 0]) == pytest.approx(1 / 4.175)


def test_a_dead_input_stands_alone() -> None:
    moment = EXACT.clone()
    moment[1] = moment[:, 1] = 0.0
    found = factored(moment, 0.1, inverse)
    assert found is not None
    assert found.result[1].tolist() == [0.0, 1.0, 0.0]


def test_what_float32_cannot_factor_float64_does_with_no_more_damping() -> None:
    """Hilbert's matrix: with little on the diagonal it is definite by less than float32 loses."""
    places = torch.arange(32)
    moment = 1.0 / (places[:, None] + places + 1).to(torch.float32)
    tried: list[torch.dtype] = []

    def use(lower: Tensor) -> Tensor:
        tried.append(lower.dtype)
        return inverse(lower)

    found = factored(moment, 1e-7, use)
    assert found is not None
    assert tried == [torch.float64]
    assert found.share == 1e-7
    assert found.in_float64
    assert bool(torch.isfinite(found.result).all())


def test_an_indefinite_moment_takes_more_damping() -> None:
    moment = torch.diag(torch.tensor([1.0, 1.0, -0.05]))
    found = factored(moment, 0.01, inverse)
    assert found is not None
    assert found.share == pytest.approx(0.1)


@pytest.mark.parametrize("worst", [float("nan"), float("inf"), -1e9])
def test_what_nothing_helps_is_told_apart(worst: float) -> None:
    moment = EXACT.clone()
    moment[2, 2] = worst
    assert factored(moment, 0.01, inverse) is None


def test_a_result_that_is_not_finite_is_no_result() -> None:
    assert factored(EXACT, 0.01, lambda lower: lower / 0) is None
