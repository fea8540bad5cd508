"""Orthogonal matrices that spread loud channels over all others, as products of small ones.

    Q = D B                a sign for each channel, then B = F1 (x) F2 (x) ... of orthogonal factors
    Q = B^T D B            where the mean has to stay: B's first row is constant and D begins with
                           one, so that Q maps the vector of ones to itself, and the mean and the
                           variance of x Q are those of x (LayerNorm)

Factors are Hadamard matrices (all entries of one size: Sylvester's of powers of two, Paley's for
the rest of a size) and, of orders for which none is built here, a random orthogonal one. Signs and
random factors come from a seed: the same seed gives the same matrix, wherever it is asked for.

A product with n channels costs n * (sum of the factors' orders) in place of n**2.

Sources: QuaRot (arXiv 2404.00456), SpinQuant (arXiv 2405.16406); Paley 1933.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# The largest power of two that is one factor: a matrix product of this order is cheap.
_LARGEST_FACTOR = 64


@dataclass(frozen=True, slots=True, eq=False)
class Rotation:
    """factors     float64 [n, n] each, orthogonal; their orders multiply to the size
    signs       float64 [size], 1 or -1
    keeps_mean  Q = B^T D B, of factors whose first rows are constant
    """

    factors: tuple[Tensor, ...]
    signs: Tensor
    keeps_mean: bool

    def __post_init__(self) -> None:
        size = math.prod(factor.shape[0] for factor in self.factors)
        assert self.signs.shape == (size,), (self.signs.shape, size)
        assert not self.keeps_mean or float(self.signs[0]) == 1.0

    @property
    def size(self) -> int:
        return self.signs.shape[0]

    def turn(self, x: Tensor) -> Tensor:
        """x Q along the last axis.  x [..., size], floating; the result has its dtype"""
        signs = self.signs.to(x.dtype)
        if self.keeps_mean:
            return self._by_factors(self._by_factors(x, inverse=True) * signs)
        return self._by_factors(x * signs)

    def _by_factors(self, x: Tensor, *, inverse: bool = False) -> Tensor:
        """x B, or x B^T, factor by factor."""
        orders = [factor.shape[0] for factor in self.factors]
        found = x.reshape(-1, *orders)
        for axis, factor in enumerate(self.factors, 1):
            matrix = factor.to(x.dtype)
            turned = found.movedim(axis, -1) @ (matrix.t() if inverse else matrix)
            found = turned.movedim(-1, axis)
        return found.reshape(x.shape)


def rotation(size: int, seed: int, *, keeps_mean: bool = False) -> Rotation:
    """An orthogonal matrix of any size from a seed."""
    generator = torch.Generator().manual_seed(seed)
    signs = 2.0 * torch.randint(2, (size,), generator=generator, dtype=torch.float64) - 1.0
    if keeps_mean:
        signs[0] = 1.0
    return Rotation(_factors(size, generator, keeps_mean), signs, keeps_mean)


def _factors(size: int, generator: torch.Generator, keeps_mean: bool) -> tuple[Tensor, ...]:
    odd = size
    twos = 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    found = []
    if odd > 1:
        # Orders of Hadamard matrices are multiples of four.
        known = hadamard(4 * odd) if twos >= 2 else None
        if known is not None:
            twos -= 2
            found.append(known / math.sqrt(4 * odd))
        else:
            made = _constant_first_row if keeps_mean else _random
            found.append(made(odd, generator))
    while twos > 0:
        order = min(2**twos, _LARGEST_FACTOR)
        walsh = hadamard(order)
        assert walsh is not None, order
        found.append(walsh / math.sqrt(order))
        twos -= order.bit_length() - 1
    return tuple(found) or (torch.ones(1, 1, dtype=torch.float64),)


def hadamard(order: int) -> Tensor | None:
    """Entries 1 and -1, rows orthogonal, the first row all ones; float64. None where no
    construction here gives that order: Sylvester's (powers of two), Paley's with a prime q, of
    orders q + 1 (q = 3 mod 4) and 2 (q + 1) (q = 1 mod 4).

    >>> hadamard(2).tolist()
    [[1.0, 1.0], [1.0, -1.0]]
    >>> [n for n in range(4, 61, 4) if hadamard(n) is None]
    [40, 52, 56]
    """
    if order & (order - 1) == 0:
        found = torch.ones(1, 1, dtype=torch.float64)
        while found.shape[0] < order:
            found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
        return found
    if order % 4 == 0 and _is_prime(order - 1):
        # q = order - 1 = 3 mod 4: I + S is Hadamard for the skew matrix S of Legendre symbols.
        matrix = torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1.0)
    elif order % 4 == 0 and _is_prime(order // 2 - 1) and (order // 2 - 1) % 4 == 1:
        conference = _bordered(order // 2 - 1, 1.0)
        one = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        other = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        identity = torch.eye(order // 2, dtype=torch.float64)
        matrix = torch.kron(conference, one) + torch.kron(identity, other)
    else:
        return None
    normalized: Tensor = matrix * matrix[0]
    return normalized


def _bordered(prime: int, below: float) -> Tensor:
    """[q + 1, q + 1]: Legendre symbols of row minus column, bordered by ones and `below`."""
    squares = {number * number % prime for number in range(1, prime)}
    symbols = [0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)]
    table = torch.tensor(symbols, dtype=torch.float64)
    numbers = torch.arange(prime)
    matrix = torch.zeros(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1.0, below
    matrix[1:, 1:] = table[(numbers.unsqueeze(1) - numbers) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _random(order: int, generator: torch.Generator) -> Tensor:
    normal = torch.randn(order, order, generator=generator, dtype=torch.float64)
    found, upper = torch.linalg.qr(normal)
    # Without this the signs would be LAPACK's choice.
    fixed: Tensor = (found * upper.diagonal().sign()).contiguous()
    return fixed


def _constant_first_row(order: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix behind the reflection of the first axis to the vector of ones."""
    mirror = torch.full((order,), -1 / math.sqrt(order), dtype=torch.float64)
    mirror[0] += 1.0
    mirror /= mirror.norm()
    reflection = torch.eye(order, dtype=torch.float64) - 2 * torch.outer(mirror, mirror)
    mixed = torch.eye(order, dtype=torch.float64)
    mixed[1:, 1:] = _random(order - 1, generator)
    return mixed @ reflection
