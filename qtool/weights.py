"""What a linear's weight can be, whatever file it came from.

Every format is a pair of pure functions, pack and unpack, on one of these, so that N formats cost
2N functions. Codes are kept unpacked, one byte each: formats disagree about bit order and axes,
never about codes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qtool import grid
from qtool.errors import FormatError
from qtool.scheme import QuantScheme


@dataclass(frozen=True, slots=True, eq=False)
class DenseWeight:
    """values [out, in], any floating dtype."""

    values: Tensor

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or not self.values.is_floating_point():
            raise FormatError(
                f"a dense weight is a floating-point matrix, found {self.values.dtype} "
                f"of shape {list(self.values.shape)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.values.to(dtype)


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedWeight:
    """Affine integers: weight = (codes - zeros) * scales, zeros being the scheme's midpoint where
    None.

    codes   [out, in]      uint8, 0 .. 2**bits - 1
    scales  [out, groups]  floating, signed
    zeros   [out, groups]  uint8, or None where the scheme is symmetric
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    scheme: QuantScheme

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise FormatError(
                f"codes must be a uint8 matrix, found {self.codes.dtype} "
                f"of shape {list(self.codes.shape)}"
            )
        out_features, in_features = self.codes.shape
        expected = (out_features, self.scheme.num_groups(in_features))
        if tuple(self.scales.shape) != expected:
            raise FormatError(
                f"scales have shape {list(self.scales.shape)}, {self.scheme} of a "
                f"{out_features} x {in_features} weight needs {list(expected)}"
            )
        if (self.zeros is None) != self.scheme.symmetric:
            raise FormatError(
                f"{self.scheme} {'takes no' if self.scheme.symmetric else 'needs'} zeros"
            )
        if self.zeros is not None and tuple(self.zeros.shape) != expected:
            raise FormatError(f"zeros have shape {list(self.zeros.shape)}, not {list(expected)}")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes once packed: codes at their width, 16-bit scales, packed zeros."""
        zeros = 0 if self.zeros is None else self.zeros.numel() * self.scheme.bits
        return (self.codes.numel() * self.scheme.bits + self.scales.numel() * 16 + zeros) // 8

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return grid.dequantize(self.codes, self.scales, self.zeros, self.scheme).to(dtype)

    def rows(self, order: Tensor) -> QuantizedWeight:
        """The same weight with its output rows in another order (int64 [out])."""
        zeros = None if self.zeros is None else self.zeros[order]
        return QuantizedWeight(self.codes[order], self.scales[order], zeros, self.scheme)


class BlockCodec(Protocol):
    """A GGUF block type: ``block_size`` weights in ``block_bytes`` bytes."""

    @property
    def name(self) -> str: ...

    @property
    def block_size(self) -> int: ...

    @property
    def block_bytes(self) -> int: ...

    def dequantize(self, data: Tensor) -> Tensor:
        """[rows, row_bytes] uint8 -> [rows, columns] float32."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class BlockWeight:
    """A GGUF block type kept as its bytes.  data [out, row_bytes] uint8."""

    data: Tensor
    columns: int
    codec: BlockCodec

    def __post_init__(self) -> None:
        blocks, rest = divmod(self.columns, self.codec.block_size)
        if rest or self.data.ndim != 2 or self.data.shape[1] != blocks * self.codec.block_bytes:
            raise FormatError(
                f"{self.codec.name} data of shape {list(self.data.shape)} does not hold "
                f"rows of {self.columns} weights"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.columns

    @property
    def nbytes(self) -> int:
        return self.data.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.codec.dequantize(self.data).to(dtype)

    def rows(self, order: Tensor) -> BlockWeight:
        return BlockWeight(self.data[order], self.columns, self.codec)


Weight = DenseWeight | QuantizedWeight | BlockWeight
