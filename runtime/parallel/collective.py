"""What ranks do together, whoever carries it out."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Collective(Protocol):
    """Every rank calls the same methods in the same order, with tensors of the same shape."""

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the ranks, in place, on all of them."""
        ...

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Every rank's tensor, in the order of the ranks, at rank 0; nothing elsewhere."""
        ...
