"""What is kept of a linear's inputs: their second moment and mean magnitude, in one pass.

GPTQ's Hessian, AWQ's objective and channel scales, and the importance matrix of GGUF quantizers are
all read from these. How they are added up, chunk by chunk, is in sums.py.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Sums over input vectors x.

    gram       [in, in] float32, sum of x xᵀ
    magnitude  [in]     float32, sum of |x|
    count      vectors seen
    peak       [in]     float32, largest |x|
    """

    gram: Tensor
    magnitude: Tensor
    count: int
    peak: Tensor

    @property
    def hessian(self) -> Tensor:
        """E[x xᵀ], [in, in]."""
        return self.gram / max(1, self.count)

    def take_hessian(self) -> Tensor:
        """E[x xᵀ] in the memory of the sum, for the largest layers; the moments are used up."""
        self.gram.div_(max(1, self.count))
        self.count = 1
        return self.gram

    @property
    def mean_magnitude(self) -> Tensor:
        """E|x|, [in]."""
        return self.magnitude / max(1, self.count)

    @property
    def mean_square(self) -> Tensor:
        """E[x²], [in]: the importance matrix of GGUF quantizers."""
        return self.gram.diagonal() / max(1, self.count)

    @property
    def is_finite(self) -> bool:
        return bool(torch.isfinite(self.magnitude).all() and torch.isfinite(self.gram).all())

    def blended(self, prior: Moments) -> Moments:
        """These moments with `prior` counted as one vector for each input it lacks.

        An expert that saw fewer vectors than it has inputs has a singular Hessian, and one that
        saw none has no Hessian at all; the layer's other experts are the best guess for it.
        """
        lacking = max(0, self.gram.shape[0] - self.count)
        if lacking == 0 or prior.count == 0:
            return self
        share = lacking / prior.count
        return Moments(
            self.gram + share * prior.gram,
            self.magnitude + share * prior.magnitude,
            self.count + lacking,
            torch.maximum(self.peak, prior.peak),
        )

    def less(self, part: Moments) -> Moments:
        """Without some of the vectors, whose own moments are `part`."""
        return Moments(
            self.gram - part.gram,
            self.magnitude - part.magnitude,
            self.count - part.count,
            self.peak,
        )


@dataclass(slots=True)
class Drift:
    """How far the quantized stream has come from the original one, as a linear's inputs x know it.

    With d what the two streams differ by at some point (original less quantized),

    cross       [rows, in] float32, sum of d xᵀ over all vectors but the held-out ones
    held_cross  [rows, in] the same over the held-out ones
    held        second moment and count of the held-out x alone
    """

    cross: Tensor
    held_cross: Tensor
    held: Moments


def total(moments: Iterable[Moments]) -> Moments:
    """The sum of several, as if one had seen all their inputs."""
    items = list(moments)
    return Moments(
        torch.stack([item.gram for item in items]).sum(0),
        torch.stack([item.magnitude for item in items]).sum(0),
        sum(item.count for item in items),
        torch.stack([item.peak for item in items]).amax(0),
    )
