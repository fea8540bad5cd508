"""Refinement moves scales and codes; the error it is given never rises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qtool import grid
from qtool.grid import Grid, dequantize, round_scales
from qtool.quantize.refine import refine
from qtool.quantize.solution import row_errors
from qtool.scheme import QuantScheme


def test_a_wrong_scale_is_refitted_by_hand() -> None:
    """Codes 8 + [2, 1] at scale 1 stand for [2, 1]; the weight is [3, 1.5], so s = 1.5 is exact."""
    scheme = QuantScheme(4, None)
    weight = torch.tensor([[3.0, 1.5]])
    codes = torch.tensor([[10, 9]], dtype=torch.uint8)
    start = Grid(torch.tensor([[1.0]]), None)
    codes, found = refine(weight, codes, start, scheme, torch.eye(2), rounds=1)
    assert found.scales.tolist() == [[1.5]]
    assert codes.tolist() == [[10, 9]]


def test_a_code_moves_to_cancel_the_error_of_another_by_hand() -> None:
    """Two inputs that are nearly equal, and a third so loud that it holds the scale at 1.

    (0.6, 0.6) rounds to (1, 1): the errors add up, and cost 0.16 + 0.16 + 2 * 0.99 * 0.16 = 0.64.
    Column 0: R = -0.4 * 1.99 = -0.8, so 1 - 0.8 rounds to 0. Column 1: R = 0.6 * 0.99 - 0.4 = 0.19,
    so 1 stays, and (0, 1) costs 0.36 + 0.16 - 2 * 0.99 * 0.24 = 0.04.
    """
    scheme = QuantScheme(4, None)
    weight = torch.tensor([[0.6, 0.6, -8.0]])
    hessian = torch.tensor([[1.0, 0.99, 0.0], [0.99, 1.0, 0.0], [0.0, 0.0, 1e6]])
    codes = torch.tensor([[9, 9, 0]], dtype=torch.uint8)
    start = Grid(torch.tensor([[1.0]]), None)
    codes, found = refine(weight, codes, start, scheme, hessian, rounds=1)
    assert found.scales.tolist() == [[1.0]]
    assert codes.tolist() == [[8, 9, 0]]


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_row_ever_gets_worse(make_layer: Callable[..., Any], bits: int, symmetric: bool) -> None:
    weight, _, hessian = make_layer(rows=40, columns=128, seed=bits)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(128)
    scheme = QuantScheme(bits, 32, symmetric)
    found = grid.fit(weight, scheme)
    codes = grid.codes(weight, found, scheme)
    before = row_errors(weight, dequantize(codes, found.scales, found.zeros, scheme), hessian)
    for _ in range(4):
        codes, found = refine(weight, codes, found, scheme, hessian, rounds=1)
        after = row_errors(weight, dequantize(codes, found.scales, found.zeros, scheme), hessian)
        assert bool((after <= before * (1 + 1e-4) + 1e-9).all())
        before = after
        assert torch.equal(found.scales, round_scales(found.scales))
        assert int(codes.max()) < scheme.num_codes


def test_it_lowers_what_rounding_leaves(make_layer: Callable[..., Any]) -> None:
    weight, _, hessian = make_layer()
    scheme = QuantScheme(4, 32)
    found = grid.fit(weight, scheme)
    codes = grid.codes(weight, found, scheme)
    before = row_errors(weight, dequantize(codes, found.scales, None, scheme), hessian).sum()
    codes, found = refine(weight, codes, found, scheme, hessian, rounds=2)
    after = row_errors(weight, dequantize(codes, found.scales, None, scheme), hessian).sum()
    assert float(after) < 0.6 * float(before)
