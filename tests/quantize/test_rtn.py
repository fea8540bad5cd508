"""Rounding to nearest: by hand, and as the mending of worse rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qtool.grid import Grid
from qtool.quantize import rtn
from qtool.quantize.solution import relative_error, round_to, row_errors
from qtool.scheme import QuantScheme


def test_one_group_by_hand() -> None:
    """The extreme 1.0 makes s = -1/8; -0.5 / s = 4, 0.3 / s = -2.4 -> -2."""
    solved = rtn.solve(torch.tensor([[1.0, -0.5, 0.3, 0.0]]), QuantScheme(4, 4))
    assert solved.weight.codes.tolist() == [[0, 12, 6, 8]]
    assert solved.dequantized.tolist() == [[1.0, -0.5, 0.25, 0.0]]


def test_a_searched_scale_loses_less(make_layer: Callable[..., Any]) -> None:
    weight = make_layer().weight
    scheme = QuantScheme(4, 32)
    plain = relative_error(weight, rtn.solve(weight, scheme).dequantized, None)
    searched = rtn.solve(weight, scheme, scale_search=True).dequantized
    assert relative_error(weight, searched, None) < plain


def test_worse_rows_take_plain_rounding_and_better_rows_stay(
    make_layer: Callable[..., Any],
) -> None:
    weight, _, hessian = make_layer(rows=4)
    scheme = QuantScheme(4, 32)
    plain = rtn.solve(weight, scheme)
    scales = rtn.solve(weight, scheme, scale_search=True, importance=hessian.diagonal())
    spoiled = scales.weight.scales.clone()
    spoiled[1] *= 3
    spoiled[3] *= 3
    mixed = rtn.keep_better_rows(weight, hessian, round_to(weight, Grid(spoiled, None), scheme))
    assert torch.equal(mixed.dequantized[[1, 3]], plain.dequantized[[1, 3]])
    errors = row_errors(weight, mixed.dequantized, hessian)
    assert bool((errors <= row_errors(weight, plain.dequantized, hessian)).all())


def test_relative_error_is_the_share_of_the_output_that_is_lost(
    make_layer: Callable[..., Any],
) -> None:
    weight, inputs, hessian = make_layer(tokens=200)
    other = weight + 0.001 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(9))
    lost = (inputs.double() @ (weight - other).double().t()).square().sum()
    power = (inputs.double() @ weight.double().t()).square().sum()
    assert abs(relative_error(weight, other, hessian) / float(lost / power) - 1) < 1e-3
