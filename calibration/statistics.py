"""What is kept of a linear's inputs: their second moment and mean magnitude, in one pass.

GPTQ's Hessian, AWQ's objective and channel scales, and the importance matrix of GGUF quantizers are
all read from these. Sums are float32 and are added chunk by chunk in one fixed order, so that a run
that was interrupted and resumed adds the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(slots=True)
class Moments:
    """Running sums over input vectors x.

    gram       [in, in] float32, sum of x xᵀ
    magnitude  [in]     float32, sum of |x|
    count      vectors seen
    peak       [in]     float32, largest |x|
    """

    gram: Tensor
    magnitude: Tensor
    count: int
    peak: Tensor

    @classmethod
    def zeros(cls, in_features: int) -> Moments:
        return cls(
            torch.zeros(in_features, in_features),
            torch.zeros(in_features),
            0,
            torch.zeros(in_features),
        )

    def add(self, inputs: Tensor) -> None:
        """inputs [..., in], any floating type."""
        vectors = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        self.add_squares(vectors)
        sizes = vectors.abs()
        self.magnitude += sizes.sum(0)
        if vectors.shape[0]:
            torch.maximum(self.peak, sizes.amax(0), out=self.peak)

    def add_squares(self, inputs: Tensor) -> None:
        """The second moment and the count alone, all that GPTQ asks for."""
        vectors = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        _add_gram(self.gram, vectors)
        self.count += vectors.shape[0]

    def include(self, other: Moments) -> None:
        """Count other vectors in, of which `other` are the moments."""
        self.gram += other.gram
        self.magnitude += other.magnitude
        torch.maximum(self.peak, other.peak, out=self.peak)
        self.count += other.count

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

    @classmethod
    def zeros(cls, rows: int, in_features: int) -> Drift:
        return cls(
            torch.zeros(rows, in_features),
            torch.zeros(rows, in_features),
            Moments.zeros(in_features),
        )

    def add(self, difference: Tensor, inputs: Tensor, *, held_out: bool) -> None:
        """difference [..., rows], inputs [..., in]"""
        vectors = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        columns = difference.reshape(-1, difference.shape[-1]).to(torch.float32)
        (self.held_cross if held_out else self.cross).addmm_(columns.t(), vectors)
        if held_out:
            self.held.add_squares(vectors)


# A square of this side and more is worth computing by halves (2048 vectors of 768, with bfloat16
# products, one Xeon core: 7.9 ms down to 128, 6.5 down to 256, 7.0 in one piece).
_SMALLEST_HALF = 256


def _add_gram(gram: Tensor, vectors: Tensor) -> None:
    """gram += vectorsᵀ vectors, computing what lies above the diagonal once: quarter by quarter,
    down to small squares.

    gram [n, n], vectors [tokens, n]
    """
    width = vectors.shape[1]
    if width < 2 * _SMALLEST_HALF:
        gram.addmm_(vectors.t(), vectors)
        return
    half = width // 2
    left, right = vectors[:, :half], vectors[:, half:]
    _add_gram(gram[:half, :half], left)
    _add_gram(gram[half:, half:], right)
    across = left.t() @ right
    gram[:half, half:] += across
    gram[half:, :half] += across.t()


def total(moments: Iterable[Moments]) -> Moments:
    """The sum of several, as if one had seen all their inputs."""
    items = list(moments)
    return Moments(
        torch.stack([item.gram for item in items]).sum(0),
        torch.stack([item.magnitude for item in items]).sum(0),
        sum(item.count for item in items),
        torch.stack([item.peak for item in items]).amax(0),
    )
