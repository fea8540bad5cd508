"""How a linear is quantized, as one readable word.

    int4-g128-sym     4-bit codes, one scale for 128 inputs, no zero point
    int8-row-sym      8-bit codes, one scale for a whole row
    int4-g64-asym     4-bit codes, a scale and a zero point for 64 inputs
    fp8-128x128       8-bit floats, one scale for 128 outputs by 128 inputs
    nf4-g64           codes that are places in a table of 16 values, one scale for 64 weights
    codebook4-row     codes that are places in a table of 16 values, a table a row

A symmetric scheme stores unsigned codes around the midpoint 2**(bits-1): weight = (code -
midpoint) * scale. The scale may be negative, so that the largest weight of a group can sit on the
one extra negative code; every format stores it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from qtool.errors import UsageError

_WORD = re.compile(r"int(?P<bits>[2-8])-(?:g(?P<group>[1-9]\d*)|row)-(?P<kind>sym|asym)")

# The group sizes that every runtime has kernels for, largest first.
PORTABLE_GROUP_SIZES = (128, 64, 32)
_CODEBOOK = "codebook"


@dataclass(frozen=True, slots=True)
class QuantScheme:
    """``group_size`` counts inputs that share a scale; None is the whole row."""

    bits: int
    group_size: int | None
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise UsageError(f"{self.bits} bits is outside 2 to 8")
        if self.group_size is not None and self.group_size < 1:
            raise UsageError(f"group size {self.group_size} is not a positive number")

    def __str__(self) -> str:
        group = "row" if self.group_size is None else f"g{self.group_size}"
        return f"int{self.bits}-{group}-{'sym' if self.symmetric else 'asym'}"

    @classmethod
    def parse(cls, text: str) -> QuantScheme:
        match = _WORD.fullmatch(text)
        if match is None:
            raise UsageError(
                f"scheme {text!r} is not understood", "write it as int4-g128-sym or int8-row-asym"
            )
        group = match["group"]
        return cls(int(match["bits"]), int(group) if group else None, match["kind"] == "sym")

    @property
    def num_codes(self) -> int:
        return int(2**self.bits)

    @property
    def midpoint(self) -> int:
        """The code that stands for zero in a symmetric scheme."""
        return int(2 ** (self.bits - 1))

    def group_width(self, in_features: int) -> int:
        """Inputs a group; raises UsageError where groups do not divide the row."""
        if self.group_size is None:
            return in_features
        if in_features % self.group_size:
            raise UsageError(
                f"{in_features} inputs are not a multiple of group size {self.group_size}",
                f"group sizes that divide it: {divisors_text(in_features)}",
            )
        return self.group_size

    def num_groups(self, in_features: int) -> int:
        return in_features // self.group_width(in_features)

    def bits_per_weight(self, in_features: int, scale_bits: int = 16) -> float:
        """Stored bits a weight: codes, 16-bit scales and, where asymmetric, packed zeros."""
        extra = scale_bits + (0 if self.symmetric else self.bits)
        return self.bits + extra / self.group_width(in_features)


def portable_group_size(in_features: int) -> int | None:
    """The largest portable group size that divides a row, or None where none does."""
    return next((size for size in PORTABLE_GROUP_SIZES if in_features % size == 0), None)


def divisors_text(in_features: int) -> str:
    sizes = [size for size in range(16, in_features + 1) if in_features % size == 0]
    return ", ".join(map(str, sizes[:8])) or "none of 16 or more"


@dataclass(frozen=True, slots=True)
class FloatScheme:
    """Codes that are small floats or places in a table, and how many weights share a scale.

    name   "fp8", "fp8e5m2", "nvfp4", "mxfp4", "mxfp8", "nf4", "fp4" or "codebook4"
    block  (outputs, inputs) that share a scale or a table; None is all of that axis

    >>> str(FloatScheme("fp8", (1, None))), str(FloatScheme("fp8", (128, 128)))
    ('fp8-row', 'fp8-128x128')
    """

    name: str
    block: tuple[int | None, int | None]

    def __str__(self) -> str:
        rows, columns = self.block
        if rows is None and columns is None:
            return f"{self.name}-tensor"
        if rows == 1:
            return f"{self.name}-row" if columns is None else f"{self.name}-g{columns}"
        return f"{self.name}-{rows or 'all'}x{columns or 'all'}"

    @property
    def table_bits(self) -> int | None:
        """Bits of a code where each row has a table of its own, else None."""
        if not self.name.startswith(_CODEBOOK):
            return None
        return int(self.name.removeprefix(_CODEBOOK))


def codebook_scheme(bits: int) -> FloatScheme:
    """Codes of `bits` bits that are places in a table of each row's own.

    >>> str(codebook_scheme(4)), codebook_scheme(3).table_bits
    ('codebook4-row', 3)
    """
    return FloatScheme(f"{_CODEBOOK}{bits}", (1, None))
