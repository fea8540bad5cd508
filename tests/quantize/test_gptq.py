"""GPTQ: worked by hand, compared with the textbook in float64, and never worse than rounding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool.grid import Grid
from qtool.quantize import gptq, rtn
from qtool.quantize.solution import relative_error, row_errors
from qtool.recipe import Gptq
from qtool.scheme import QuantScheme

SCHEMES = [
    QuantScheme(4, 32),
    QuantScheme(3, 64),
    QuantScheme(2, 128),
    QuantScheme(8, None),
    QuantScheme(4, 32, symmetric=False),
]


def textbook(
    weight: Tensor, hessian: Tensor, grid: Grid, scheme: QuantScheme, damp: float
) -> Tensor:
    """The algorithm as the paper writes it: float64, one column at a time, three Cholesky steps.
    Returns the dequantized weight."""
    columns = weight.shape[1]
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    h = hessian.double()[order][:, order]
    h += damp * h.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(h))
    upper = torch.linalg.cholesky(inverse, upper=True)
    group = torch.arange(columns) // scheme.group_width(columns)
    w = weight.double()[:, order].clone()
    result = torch.zeros_like(w)
    for j, column in enumerate(order.tolist()):
        scale = grid.scales.double()[:, group[column]]
        zero = (
            torch.full_like(scale, scheme.midpoint)
            if grid.zeros is None
            else grid.zeros.double()[:, group[column]]
        )
        code = (torch.round(w[:, j] / scale) + zero).clamp(0, scheme.num_codes - 1)
        result[:, j] = (code - zero) * scale
        error = (w[:, j] - result[:, j]) / upper[j, j]
        w[:, j:] -= error.unsqueeze(1) * upper[j, j:]
    return result[:, torch.argsort(order)]


def test_two_columns_by_hand() -> None:
    """H = [[2, 1], [1, 1]], so act-order keeps the order, and with next to no damping
    H⁻¹ = [[1, -1], [-1, 2]] = Uᵀ U with U = [[1, -1], [0, 1]].

    One group, scale 1 (the extreme -8 makes it so): column 0 holds 1.4 -> 1, error 0.4; column 1
    moves by -0.4 * U01 / U00 = +0.4, from 2.2 to 2.6 -> 3, where plain rounding gives 2. The error
    d = (0.4, -0.8) costs 0.32 - 0.64 + 0.64 = 0.32, plain rounding's (0.4, 0.2) 0.52.
    """
    scheme = QuantScheme(4, None)
    hessian = torch.tensor([[2.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.5]])
    weight = torch.tensor([[1.4, 2.2, -8.0]])
    options = Gptq(damping=1e-7, scale_search=False)
    solved = gptq.solve(weight, hessian, scheme, options)
    assert solved.weight.scales.tolist() == [[1.0]]
    assert solved.dequantized.tolist() == [[1.0, 3.0, -8.0]]
    assert float(row_errors(weight, solved.dequantized, hessian)) == pytest.approx(0.32, rel=1e-4)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("search", [False, True], ids=["absmax", "search"])
def test_agrees_with_the_textbook_in_float64(
    make_layer: Callable[..., Any], scheme: QuantScheme, search: bool
) -> None:
    weight, _, hessian = make_layer(rows=24)
    options = Gptq(damping=0.01, scale_search=search)
    solved = gptq.solve(weight, hessian, scheme, options)
    zeros = None if solved.weight.zeros is None else solved.weight.zeros.float()
    expected = textbook(weight, hessian, Grid(solved.weight.scales, zeros), scheme, 0.01)
    # A tie or a hair's breadth in float32 may send single weights another way; the error tells.
    same = (solved.dequantized - expected).abs() < 1e-6
    assert float(same.double().mean()) > 0.97
    ours = relative_error(weight, solved.dequantized, hessian)
    assert ours == pytest.approx(relative_error(weight, expected.float(), hessian), rel=0.05)


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("tokens", [8, 100, 2000])
def test_no_row_is_worse_than_plain_rounding(
    make_layer: Callable[..., Any], scheme: QuantScheme, tokens: int
) -> None:
    for seed in range(3):
        weight, _, hessian = make_layer(tokens=tokens, seed=seed)
        solved = gptq.solve(weight, hessian, scheme, Gptq(refine_rounds=1))
        plain = rtn.solve(weight, scheme)
        ours = row_errors(weight, solved.dequantized, hessian)
        rounding = row_errors(weight, plain.dequantized, hessian)
        assert bool((ours <= rounding * (1 + 1e-5)).all())


def test_calibrated_stack_beats_its_parts(make_layer: Callable[..., Any]) -> None:
    """Each step of the default recipe lowers the error of a layer with correlated inputs."""
    weight, _, hessian = make_layer(rows=96, columns=256, tokens=4096)
    scheme = QuantScheme(4, 128)
    steps = [
        rtn.solve(weight, scheme),
        gptq.solve(weight, hessian, scheme, Gptq(scale_search=False)),
        gptq.solve(weight, hessian, scheme, Gptq(scale_search=True)),
        gptq.solve(weight, hessian, scheme, Gptq(scale_search=True, refine_rounds=2)),
    ]
    errors = [relative_error(weight, step.dequantized, hessian) for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.4 * errors[0]


def test_what_is_stored_decodes_to_what_was_solved(make_layer: Callable[..., Any]) -> None:
    weight, _, hessian = make_layer()
    for scheme in SCHEMES:
        solved = gptq.solve(weight, hessian, scheme, Gptq(refine_rounds=1))
        assert torch.equal(solved.weight.dequantize(), solved.dequantized)


def test_inputs_that_are_always_zero_are_rounded_plainly(make_layer: Callable[..., Any]) -> None:
    weight, inputs, _ = make_layer()
    inputs = inputs.clone()
    inputs[:, 5] = 0
    inputs[:, 77] = 0
    hessian = inputs.t() @ inputs / inputs.shape[0]
    scheme = QuantScheme(4, 32)
    solved = gptq.solve(weight, hessian, scheme, Gptq())
    scales = solved.weight.scales[:, [5 // 32, 77 // 32]]
    steps = torch.round(weight[:, [5, 77]] / scales).clamp(-8, 7)
    assert torch.equal(solved.dequantized[:, [5, 77]], steps * scales)
    assert bool(torch.isfinite(solved.dequantized).all())


def test_a_singular_hessian_is_damped_until_it_factors(make_layer: Callable[..., Any]) -> None:
    weight, _, hessian = make_layer(tokens=3)
    solved = gptq.solve(weight, hessian, QuantScheme(4, 32), Gptq(damping=0.01))
    assert solved.fallbacks == ()
    indefinite = hessian - 0.05 * hessian.diagonal().mean() * torch.eye(128)
    solved = gptq.solve(weight, indefinite, QuantScheme(4, 32), Gptq(damping=0.01))
    assert solved.fallbacks == ("damping raised to 0.1",)


def test_what_float64_alone_can_factor_is_said(make_layer: Callable[..., Any]) -> None:
    weight, _, _ = make_layer(columns=32)
    places = torch.arange(32)
    hilbert = 1.0 / (places[:, None] + places + 1).to(torch.float32)
    scheme = QuantScheme(4, 32)
    assert gptq.solve(weight, hilbert, scheme, Gptq(damping=1e-7)).fallbacks == (gptq.IN_FLOAT64,)
    assert gptq.solve(weight, hilbert, scheme, Gptq(damping=1e-2)).fallbacks == ()


def test_a_hopeless_hessian_falls_back_to_rounding_and_says_so(
    make_layer: Callable[..., Any],
) -> None:
    weight, _, hessian = make_layer()
    broken = hessian.clone()
    broken[0, 1] = broken[1, 0] = float("nan")
    solved = gptq.solve(weight, broken, QuantScheme(4, 32), Gptq())
    assert len(solved.fallbacks) == 1
    assert "rounded to nearest" in solved.fallbacks[0]
    assert bool(torch.isfinite(solved.dequantized).all())


def test_stacked_linears_are_solved_as_if_alone(make_layer: Callable[..., Any]) -> None:
    """q, k and v share a Hessian and are one problem; rows do not know of each other."""
    weight, _, hessian = make_layer(rows=64)
    scheme = QuantScheme(4, 32)
    together = gptq.solve(weight, hessian, scheme, Gptq()).dequantized
    apart = [gptq.solve(part, hessian, scheme, Gptq()).dequantized for part in weight.split(32)]
    different = (together != torch.cat(apart)).double().mean()
    assert float(different) < 0.01
