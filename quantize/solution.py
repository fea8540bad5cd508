"""What every solver returns, and the error by which solvers are compared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from qtool import grid
from qtool.grid import Grid
from qtool.scheme import QuantScheme
from qtool.weights import QuantizedWeight, TableWeight, Weight


class Solution(NamedTuple):
    """weight       what is stored
    dequantized  [out, in] float32, exactly what the stored weight decodes to
    fallbacks    where the numbers did not allow what was asked, for the report
    lost         [out] float32, d H dᵀ of each row, where the solver came to know it
    """

    weight: Weight
    dequantized: Tensor
    fallbacks: tuple[str, ...] = ()
    lost: Tensor | None = None

    @property
    def integers(self) -> QuantizedWeight:
        """The weight of a solver that makes integers."""
        assert isinstance(self.weight, QuantizedWeight)
        return self.weight


def on(solved: Solution, device: torch.device) -> Solution:
    """The same solution with all of its tensors on a device."""
    if solved.dequantized.device == device:
        return solved
    tensors = {
        field.name: value.to(device)
        for field in fields(solved.weight)
        if isinstance(value := getattr(solved.weight, field.name), Tensor)
    }
    lost = None if solved.lost is None else solved.lost.to(device)
    weight: Weight = replace(solved.weight, **tensors)  # type: ignore[arg-type]
    return Solution(weight, solved.dequantized.to(device), solved.fallbacks, lost)


def joined(parts: Sequence[Solution]) -> Solution:
    """Slices of rows as one."""
    if len(parts) == 1:
        return parts[0]
    first = parts[0].integers
    zeros = [part.integers.zeros for part in parts if part.integers.zeros is not None]
    lost = [part.lost for part in parts if part.lost is not None]
    weight = QuantizedWeight(
        torch.cat([part.integers.codes for part in parts]),
        torch.cat([part.integers.scales for part in parts]),
        torch.cat(zeros) if zeros else None,
        first.scheme,
    )
    dequantized = torch.cat([part.dequantized for part in parts])
    fallbacks = tuple(dict.fromkeys(text for part in parts for text in part.fallbacks))
    return Solution(weight, dequantized, fallbacks, torch.cat(lost) if lost else None)


def rows(solved: Solution, start: int, stop: int) -> Solution:
    """A slice of a solution's rows."""
    order = torch.arange(start, stop, device=solved.dequantized.device)
    lost = None if solved.lost is None else solved.lost[start:stop]
    assert isinstance(solved.weight, QuantizedWeight | TableWeight)
    return Solution(
        solved.weight.rows(order), solved.dequantized[start:stop], solved.fallbacks, lost
    )


def from_codes(
    codes: Tensor, found: Grid, scheme: QuantScheme, fallbacks: tuple[str, ...]
) -> Solution:
    """A solution from codes [out, in] uint8 on a grid."""
    zeros = None if found.zeros is None else found.zeros.to(torch.uint8)
    weight = QuantizedWeight(codes, found.scales, zeros, scheme)
    return Solution(weight, weight.dequantize(), fallbacks)


def round_to(
    weight: Tensor, found: Grid, scheme: QuantScheme, fallbacks: tuple[str, ...] = ()
) -> Solution:
    """Round weight [out, in] float32 to the nearest point of a grid."""
    return from_codes(grid.codes(weight, found, scheme), found, scheme, fallbacks)


def row_errors(weight: Tensor, dequantized: Tensor, hessian: Tensor | None) -> Tensor:
    """What each output row loses, d H dᵀ with d = weight - dequantized.

    weight, dequantized  [out, in] float32
    hessian              [in, in] float32, or None for the identity
    returns              [out] float32
    """
    difference = weight - dequantized
    if hessian is None:
        return difference.square().sum(1)
    return ((difference @ hessian) * difference).sum(1)


def power(weight: Tensor, hessian: Tensor | None) -> float:
    """tr(W H Wᵀ): what there is to lose."""
    return float(row_errors(weight, weight.new_zeros(()), hessian).double().sum())


def relative_error(weight: Tensor, dequantized: Tensor, hessian: Tensor | None) -> float:
    """tr(d H dᵀ) / tr(W H Wᵀ): the share of the layer's output power that is lost."""
    lost = float(row_errors(weight, dequantized, hessian).double().sum())
    return share(lost, power(weight, hessian))


def share(lost: float, there: float) -> float:
    return lost / there if there > 0 else lost
