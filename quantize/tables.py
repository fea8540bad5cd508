"""The best table of values for each row of a weight: k-means in one dimension, weighted.

The cost of a row's table is the sum over its inputs of importance * (w - nearest entry)**2, where
importance is the mean square of each input (the diagonal of the layer's Hessian): SqueezeLLM's idea
(arXiv 2306.07629), with the inputs' own power in place of gradients.

In one dimension clusters are runs of the sorted values, so the best ones are found by dynamic
programming, D_k[j] = min over i of D_(k-1)[i] + cost(i, j), and not by luck of a start:

- a row of up to _PLACES inputs is solved exactly;
- a longer one may cut at _PLACES places alone, half of them at equal ranks and half at equal
  distances, so that neither the bulk nor the outliers go without, and is then moved to where it
  rests by Lloyd's iterations over all of its values, which never raise the cost.

Tables are rounded to fp16 as files store them, codes are chosen after that, and a row whose plain
absmax grid costs less keeps that: such a grid, of bfloat16 scales, is a table of fp16 exactly.

Worked, two entries, importance one: 0 1 2 10 12 -> {0 1 2} {10 12}, table 1 and 11, cost 2 + 2.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qtool.grid import fit_absmax
from qtool.scheme import QuantScheme

# Where a row may be cut. 16 entries for 4,096 inputs, after Lloyd's iterations: 0.7 % above what
# 512 places find, 128 places 0.2 %; the time grows with the square.
_PLACES = 64
_LLOYD_ROUNDS = 40
# Of costs held at a time: 1 MB, which stays in the cache.
_CHUNK_COSTS = 2**18
_HALF_LARGEST, _HALF_PRECISE = 65504.0, 2.0**-10


def best_tables(weight: Tensor, importance: Tensor, num_entries: int) -> Tensor:
    """Tables [out, num_entries], ascending, fp16 or, where that does not hold them, float32.

    weight      [out, in] float32
    importance  [in] float32, not negative, not all zero
    """
    rows = max(1, _CHUNK_COSTS // min(_PLACES, weight.shape[1]) ** 2)
    tables = torch.cat(
        [
            _solve(_Sums.of(weight[start : start + rows], importance), num_entries)
            for start in range(0, weight.shape[0], rows)
        ]
    )
    tables = tables.to(table_dtype(weight))
    scheme = QuantScheme((num_entries - 1).bit_length(), None)
    steps = torch.arange(num_entries, device=weight.device) - scheme.midpoint
    plain = (fit_absmax(weight, scheme).scales * steps).sort(1).values.to(tables.dtype)
    better = _cost(weight, importance, plain) < _cost(weight, importance, tables)
    return torch.where(better.unsqueeze(1), plain, tables)


def table_dtype(weight: Tensor) -> torch.dtype:
    """fp16 unless a row is too loud for it, or too quiet to be told apart in it."""
    largest = weight.abs().amax(1)
    quiet = (largest < _HALF_PRECISE) & (largest > 0)
    loud = largest > _HALF_LARGEST
    return torch.float32 if bool((quiet | loud).any()) else torch.float16


def nearest(weight: Tensor, tables: Tensor) -> Tensor:
    """Codes [out, in] uint8 of the nearest entries; ties to the lower one.

    tables  [out, entries], ascending
    """
    wide = tables.to(torch.float32)
    bounds = (wide[:, 1:] + wide[:, :-1]) / 2
    return torch.searchsorted(bounds, weight).to(torch.uint8)


def looked_up(codes: Tensor, tables: Tensor) -> Tensor:
    """[out, in] float32"""
    return torch.gather(tables.to(torch.float32), 1, codes.long())


def _cost(weight: Tensor, importance: Tensor, tables: Tensor) -> Tensor:
    """[out] float64"""
    error = (looked_up(nearest(weight, tables), tables) - weight).double()
    return (error.square() * importance).sum(1)


class _Sums(NamedTuple):
    """Of rows sorted by value: values [out, in] float32; mass, first, second [out, in + 1] float64:
    running sums of importance, importance * w and importance * w**2, zero first.
    """

    values: Tensor
    mass: Tensor
    first: Tensor
    second: Tensor

    @classmethod
    def of(cls, weight: Tensor, importance: Tensor) -> _Sums:
        values, order = weight.sort(dim=1, stable=True)
        mass, wide = importance.double()[order], values.double()
        running = (
            torch.nn.functional.pad(term.cumsum(1), (1, 0))
            for term in (mass, mass * wide, mass * wide * wide)
        )
        return cls(values.contiguous(), *running)


def _solve(sums: _Sums, num_entries: int) -> Tensor:
    """Tables [out, num_entries] float32, ascending."""
    cuts = _best_cuts(sums, num_entries)
    tables = _means(sums, cuts)
    for _ in range(_LLOYD_ROUNDS):
        bounds = ((tables[:, 1:] + tables[:, :-1]) / 2).float().contiguous()
        inner = torch.searchsorted(sums.values, bounds, right=True)
        moved = torch.cat([cuts[:, :1], inner, cuts[:, -1:]], 1)
        if torch.equal(moved, cuts):
            break
        cuts = moved
        tables = _means(sums, cuts, tables)
    return tables.float().sort(1).values


def _best_cuts(sums: _Sums, num_entries: int) -> Tensor:
    """[out, num_entries + 1] int64: where runs begin in the sorted row, and its end."""
    places = _places(sums)
    mass, first, second = (torch.gather(part, 1, places) for part in sums[1:])
    # cost[i, j]: of one cluster from place i to place j.
    weights = mass.unsqueeze(1) - mass.unsqueeze(2)
    moments = first.unsqueeze(1) - first.unsqueeze(2)
    cost = second.unsqueeze(1) - second.unsqueeze(2)
    cost -= torch.where(weights > 0, moments.square() / weights.clamp(min=1e-300), 0.0)
    cost = cost.clamp_(min=0).to(torch.float32)
    count = places.shape[1]
    backwards = torch.ones(count, count, dtype=torch.bool, device=cost.device).tril(-1)
    cost.masked_fill_(backwards, torch.inf)
    reached = cost[:, 0]
    chosen = []
    for _ in range(num_entries - 1):
        reached, came_from = (reached.unsqueeze(2) + cost).min(1)
        chosen.append(came_from)
    here = torch.full_like(places[:, :1], count - 1)
    cuts = [here]
    for came_from in reversed(chosen):
        here = torch.gather(came_from, 1, here)
        cuts.append(here)
    cuts.append(torch.zeros_like(here))
    return torch.gather(places, 1, torch.cat(cuts[::-1], 1))


def _places(sums: _Sums) -> Tensor:
    """[out, places] int64, ascending from 0 to the row's length."""
    rows, length = sums.values.shape
    device = sums.values.device
    if length <= _PLACES:
        return torch.arange(length + 1, device=device).expand(rows, -1).contiguous()
    ranks = torch.linspace(0, length, _PLACES // 2, device=device).round().long().expand(rows, -1)
    low, high = sums.values[:, :1], sums.values[:, -1:]
    shares = torch.linspace(0, 1, _PLACES // 2 + 2, device=device)[1:-1]
    levels = (low + (high - low) * shares).contiguous()
    return torch.cat([ranks, torch.searchsorted(sums.values, levels)], 1).sort(1).values


def _means(sums: _Sums, cuts: Tensor, otherwise: Tensor | None = None) -> Tensor:
    """Of each run, [out, num_entries] float64; an empty one keeps its entry, or takes the value
    that it stands before.
    """
    mass, first = (torch.gather(part, 1, cuts).diff(dim=1) for part in (sums.mass, sums.first))
    if otherwise is None:
        last = sums.values.shape[1] - 1
        otherwise = torch.gather(sums.values, 1, cuts[:, :-1].clamp(max=last)).double()
    return torch.where(mass > 0, first / mass.clamp(min=1e-300), otherwise)
