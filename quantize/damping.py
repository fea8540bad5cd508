"""Second moments of calibration data are seldom well conditioned: damp them until they factor.

A share of the mean diagonal is added to the diagonal. Where the factorization fails, or what is
made of it is not finite, it is tried in float64, then with ten times the damping, three times.
A dead input's zero on the diagonal becomes one, so that it stands alone and moves nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

_ATTEMPTS = 4


class Factored(NamedTuple):
    """result  float32, what was made of the factor
    share   of the mean diagonal that had to be added
    in_float64  float32 was tried with this share and did not do
    """

    result: Tensor
    share: float
    in_float64: bool


def factored(moment: Tensor, damping: float, use: Callable[[Tensor], Tensor]) -> Factored | None:
    """`use` of the lower Cholesky factor of a damped moment; None where no damping within reach
    makes that finite.

    moment  [in, in] float32; its diagonal is raised meanwhile, and put back
    use     from a lower factor, float32 or float64, to a tensor of its type
    """
    if not bool(torch.isfinite(moment).all()):
        return None
    # In place: another matrix of this size is a tenth of what a large layer takes of a device.
    diagonal = moment.diagonal().clone()
    try:
        for attempt in range(_ATTEMPTS):
            share = damping * 10**attempt
            moment.diagonal().copy_(raised(diagonal, share))
            for dtype in (torch.float32, torch.float64):
                lower, info = torch.linalg.cholesky_ex(moment.to(dtype))
                if int(info) != 0:
                    continue
                result = use(lower).to(torch.float32)
                if bool(torch.isfinite(result).all()):
                    return Factored(result, share, dtype == torch.float64)
        return None
    finally:
        moment.diagonal().copy_(diagonal)


def raised(diagonal: Tensor, share: float) -> Tensor:
    """The damped diagonal, with one in place of a dead input's zero."""
    return torch.where(diagonal == 0, 1.0, diagonal + share * diagonal.mean())
