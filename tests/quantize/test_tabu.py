"""Tabu search finds what no single move does, and never ends above where it began."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qtool import grid
from qtool.grid import Grid, dequantize
from qtool.quantize.refine import refine
from qtool.quantize.solution import row_errors
from qtool.quantize.tabu import tabu_search
from qtool.scheme import QuantScheme


def test_two_codes_trade_by_hand() -> None:
    """Inputs that are nearly equal, with errors (0.6, -0.6): 0.36 + 0.36 - 1.8 * 0.36 = 0.072.

    Either code alone leaves (-0.4, -0.6) or (0.6, 0.4), 0.52 + 1.8 * 0.24 = 0.952. Both leave
    (-0.4, 0.4), 0.32 - 1.8 * 0.16 = 0.032.
    """
    scheme = QuantScheme(4, None)
    weight = torch.tensor([[0.6, -0.6]])
    hessian = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    codes = torch.tensor([[8, 8]], dtype=torch.uint8)
    found = Grid(torch.tensor([[1.0]]), None)
    alone, _ = refine(weight, codes, found, scheme, hessian, rounds=1)
    assert alone.tolist() == [[8, 8]]
    assert tabu_search(weight, codes, found, scheme, hessian, steps=1).tolist() == [[8, 8]]
    assert tabu_search(weight, codes, found, scheme, hessian, steps=2).tolist() == [[9, 7]]
    # What is found stays found, however long the search wanders on.
    assert tabu_search(weight, codes, found, scheme, hessian, steps=9).tolist() == [[9, 7]]


def start(weight: Tensor, hessian: Tensor, scheme: QuantScheme) -> tuple[Tensor, Grid]:
    """Codes that no single move makes better."""
    found = grid.fit(weight, scheme)
    codes = grid.codes(weight, found, scheme)
    return refine(weight, codes, found, scheme, hessian, rounds=4)


def errors(
    weight: Tensor, codes: Tensor, found: Grid, scheme: QuantScheme, hessian: Tensor
) -> Tensor:
    return row_errors(weight, dequantize(codes, found.scales, found.zeros, scheme), hessian)


@pytest.mark.parametrize("symmetric", [True, False])
def test_most_rows_end_at_the_best_of_all_codes(
    make_layer: Callable[..., Any], symmetric: bool
) -> None:
    """Against all 4**6 choices of codes for six columns, from plain rounding."""
    weight, _, hessian = make_layer(rows=32, columns=6, seed=3)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(6)
    scheme = QuantScheme(2, None, symmetric)
    found = grid.fit(weight, scheme)
    codes = grid.codes(weight, found, scheme)
    searched = tabu_search(weight, codes, found, scheme, hessian, steps=200)
    choices = torch.tensor(list(itertools.product(range(4), repeat=6)), dtype=torch.uint8)
    least = torch.empty(weight.shape[0])
    for row in range(weight.shape[0]):
        zeros = None if found.zeros is None else found.zeros[row].expand(len(choices), 1)
        every = Grid(found.scales[row].expand(len(choices), 1), zeros)
        least[row] = errors(weight[row], choices, every, scheme, hessian).min()
    before = errors(weight, codes, found, scheme, hessian)
    after = errors(weight, searched, found, scheme, hessian)
    assert bool((after >= 0.999 * least).all())
    assert int((before <= 1.001 * least).sum()) <= 12
    assert int((after <= 1.001 * least).sum()) >= 22


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [96, 97])
def test_no_row_gets_worse_and_codes_stay_on_the_grid(
    make_layer: Callable[..., Any], bits: int, symmetric: bool, columns: int
) -> None:
    weight, _, hessian = make_layer(rows=24, columns=columns, seed=bits)
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(columns)
    scheme = QuantScheme(bits, None if columns == 97 else 32, symmetric)
    codes, found = start(weight, hessian, scheme)
    before = errors(weight, codes, found, scheme, hessian)
    searched = tabu_search(weight, codes, found, scheme, hessian, steps=64)
    after = errors(weight, searched, found, scheme, hessian)
    assert bool((after <= before * (1 + 1e-4) + 1e-9).all())
    assert float(after.sum()) < 0.985 * float(before.sum())
    assert int(searched.max()) < scheme.num_codes


def test_rows_are_searched_alike_alone_and_together(make_layer: Callable[..., Any]) -> None:
    weight, _, hessian = make_layer(rows=2100, columns=32)
    scheme = QuantScheme(3, 32)
    codes, found = start(weight, hessian, scheme)
    together = tabu_search(weight, codes, found, scheme, hessian, steps=8)
    last = slice(2090, 2100)
    part = Grid(found.scales[last], None)
    alone = tabu_search(weight[last], codes[last], part, scheme, hessian, steps=8)
    assert float((alone != together[last]).double().mean()) < 0.01


def test_one_column_is_searched_too() -> None:
    weight = torch.tensor([[0.5]])
    found = Grid(torch.tensor([[0.5]]), None)
    codes = torch.tensor([[3]], dtype=torch.uint8)
    scheme = QuantScheme(2, None)
    assert tabu_search(weight, codes, found, scheme, torch.eye(1), steps=5).tolist() == [[3]]
