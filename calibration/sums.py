"""Sums over calibration data that come out the same in whatever order its chunks are added.

A chunk's products are computed as they are anywhere, in float32, and added in float64. Float32 has
24 bits and float64 53, so up to rare cases nothing is rounded before the whole sum goes back to
float32, and the statistics, the codes that are solved with them and the files do not know whether
one process saw all chunks or several ranks shared them. Summed in float32, two ranks' order tipped
codes over in some block, which moved all behind it: KL divergence by up to 4 % on books-7m.

A second moment is symmetric and is computed and kept in strips of rows from its diagonal on, so
the wider numbers take little more memory than a whole matrix of float32 (8.5 against 8 GiB for
128 experts of 4096 inputs) and about the same time: 0.9 to 1.1 of the CPU time of adding to a whole
float32 matrix in place, in two paired runs of chunks of 2048 vectors of 256 to 2048 inputs, 0.9 for
a drift (bfloat16 products, one core of a loaded Xeon, 2026-11).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.calibration.placement import CPU
from qtool.calibration.statistics import Drift, Moments

# Rows of a strip (2048 vectors of 768, with bfloat16 products, one core of a Xeon that others use:
# 12 ms in one piece, 9.6 in two strips, 7.2 in three, 9.6 in six; 13 in squares of 384).
_STRIP = 256
# Rows that are widened and added at once: torch widens all of what it adds before it adds, and so
# much of it stays in the cache.
_ROWS_AT_ONCE = 64


@dataclass(slots=True)
class Squares:
    """A running sum of x xᵀ.

    width  of the vectors
    flat   float64, the strips of `_strips` one behind the other
    """

    width: int
    flat: Tensor

    @classmethod
    def zeros(cls, width: int, device: torch.device = CPU) -> Squares:
        return cls(width, torch.zeros(squares_size(width), dtype=torch.float64, device=device))

    def add(self, vectors: Tensor) -> None:
        """vectors [tokens, width] float32"""
        for rows, columns, total in self._parts():
            _add(total, vectors[:, rows].t() @ vectors[:, columns])

    def gram(self) -> Tensor:
        """[width, width] float32"""
        found = torch.empty(self.width, self.width, device=self.flat.device)
        for rows, columns, total in self._parts():
            found[rows, columns] = total
            beside = slice(rows.stop, None)
            found[beside, rows] = found[rows, beside].t()
        return found

    def _parts(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Rows, columns, and the sum's part there, a view."""
        start = 0
        for rows, columns in _strips(self.width):
            shape = _side(rows), _side(columns)
            end = start + shape[0] * shape[1]
            yield rows, columns, self.flat[start:end].view(shape)
            start = end


def squares_size(width: int) -> int:
    """Numbers that the sum of vectors of a width is kept in."""
    return sum(_side(rows) * _side(columns) for rows, columns in _strips(width))


def _strips(width: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the strips that cover a diagonal and what lies above it: for 768

    a a a
    . b b
    . . c
    """
    for first in range(0, width, _STRIP):
        yield slice(first, min(first + _STRIP, width)), slice(first, width)


def _side(places: slice) -> int:
    side: int = places.stop - places.start
    return side


def _add(total: Tensor, product: Tensor) -> None:
    """total [rows, columns] float64 += product, float32"""
    parts = torch.split(total, _ROWS_AT_ONCE), torch.split(product, _ROWS_AT_ONCE)
    for rows, more in zip(*parts, strict=True):
        rows += more


@dataclass(slots=True)
class MomentSums:
    """What `Moments` are made of, while vectors x are still coming.

    squares    sum of x xᵀ
    magnitude  [in] float64, sum of |x|
    count      vectors seen
    peak       [in] float32, largest |x|
    """

    squares: Squares
    magnitude: Tensor
    count: int
    peak: Tensor

    @classmethod
    def zeros(cls, in_features: int, device: torch.device = CPU) -> MomentSums:
        return cls(
            Squares.zeros(in_features, device),
            torch.zeros(in_features, dtype=torch.float64, device=device),
            0,
            torch.zeros(in_features, device=device),
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
        self.squares.add(vectors)
        self.count += vectors.shape[0]

    def include(self, other: MomentSums) -> None:
        """Count other vectors in, of which `other` are the sums."""
        self.squares.flat += other.squares.flat
        self.magnitude += other.magnitude
        torch.maximum(self.peak, other.peak, out=self.peak)
        self.count += other.count

    def moments(self) -> Moments:
        magnitude = self.magnitude.to(torch.float32)
        return Moments(self.squares.gram(), magnitude, self.count, self.peak)


@dataclass(slots=True)
class DriftSums:
    """What a `Drift` is made of, while inputs are still coming; crosses are float64."""

    cross: Tensor
    held_cross: Tensor
    held: MomentSums

    @classmethod
    def zeros(cls, rows: int, in_features: int, device: torch.device = CPU) -> DriftSums:
        return cls(
            torch.zeros(rows, in_features, dtype=torch.float64, device=device),
            torch.zeros(rows, in_features, dtype=torch.float64, device=device),
            MomentSums.zeros(in_features, device),
        )

    def add(self, difference: Tensor, inputs: Tensor, *, held_out: bool) -> None:
        """difference [..., rows], inputs [..., in]"""
        vectors = inputs.reshape(-1, inputs.shape[-1]).to(torch.float32)
        columns = difference.reshape(-1, difference.shape[-1]).to(torch.float32)
        _add(self.held_cross if held_out else self.cross, columns.t() @ vectors)
        if held_out:
            self.held.add_squares(vectors)

    def drift(self) -> Drift:
        cross, held_cross = (tensor.to(torch.float32) for tensor in (self.cross, self.held_cross))
        return Drift(cross, held_cross, self.held.moments())
