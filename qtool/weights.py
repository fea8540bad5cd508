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
from qtool.scheme import FloatScheme, QuantScheme

# Of blocks, that are unpacked at a time: 1 MB in float32.
SLAB_WEIGHTS = 1 << 18


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

    def rows(self, order: Tensor) -> DenseWeight:
        """The same weight with its output rows in another order (int64 [out])."""
        return DenseWeight(self.values[order])


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

    def widened(self, bits: int) -> QuantizedWeight:
        """The same weight in codes of `bits` bits, no fewer than it has: symmetric codes move with
        the midpoint, others stay.
        """
        assert bits >= self.scheme.bits, (bits, self.scheme)
        scheme = QuantScheme(bits, self.scheme.group_size, self.scheme.symmetric)
        codes = self.codes
        if self.zeros is None:
            codes = codes + (scheme.midpoint - self.scheme.midpoint)
        return QuantizedWeight(codes, self.scales, self.zeros, scheme)

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
        if dtype == torch.float32:
            return self.codec.dequantize(self.data).to(dtype)
        # In slabs that stay in cache: an embedding in float32 is half a gigabyte to write and read.
        values = torch.empty(self.shape, dtype=dtype, device=self.data.device)
        height = max(1, SLAB_WEIGHTS // self.columns)
        for begin in range(0, self.shape[0], height):
            rows = slice(begin, begin + height)
            values[rows] = self.codec.dequantize(self.data[rows])
        return values

    def rows(self, order: Tensor) -> BlockWeight:
        return BlockWeight(self.data[order], self.columns, self.codec)


@dataclass(frozen=True, slots=True, eq=False)
class Float8Weight:
    """8-bit floats with a scale a block: weight = values * scale.

    values  [out, in]                float8_e4m3fn or float8_e5m2
    scales  [row blocks, columns blocks] floating; the last block of an axis may be cut short
    """

    values: Tensor
    scales: Tensor
    scheme: FloatScheme

    def __post_init__(self) -> None:
        if self.values.ndim != 2 or self.values.dtype not in FLOAT8_TYPES:
            raise FormatError(
                f"8-bit floats must be a float8 matrix, found {self.values.dtype} "
                f"of shape {list(self.values.shape)}"
            )
        expected = num_blocks(self.shape, self.scheme)
        if tuple(self.scales.shape) != expected:
            raise FormatError(
                f"scales have shape {list(self.scales.shape)}, {self.scheme} of a "
                f"{self.shape[0]} x {self.shape[1]} weight needs {list(expected)}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def nbytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        rows, columns = self.scheme.block
        out_features, in_features = self.shape
        scales = self.scales.to(torch.float32)
        # A block may claim to be larger than the weight.
        if columns is not None:
            scales = scales.repeat_interleave(min(columns, in_features), 1)[:, :in_features]
        if rows is not None:
            scales = scales.repeat_interleave(min(rows, out_features), 0)[:out_features]
        return (self.values.to(torch.float32) * scales).to(dtype)

    def rows(self, order: Tensor) -> Float8Weight:
        """Some of its output rows, or all of them in another order (int64 [n])."""
        height, columns = self.scheme.block
        blocks = torch.zeros_like(order) if height is None else order // height
        scheme = FloatScheme(self.scheme.name, (1, columns))
        # Bytes are gathered: torch does not index every 8-bit float type.
        values = self.values.view(torch.uint8)[order].view(self.values.dtype)
        return Float8Weight(values, self.scales[blocks], scheme)


@dataclass(frozen=True, slots=True, eq=False)
class CodebookWeight:
    """Codes that are places in a table: weight = codebook[code] * scale.

    codes       [out, in]   uint8
    codebook    [n]         float32
    scales      [blocks]    float32, one for each run of weights of the flattened matrix, as long
                            as the scheme's block; a run may cross rows, the last may be cut short
    scale_bits  bits that a scale takes where the weight comes from
    """

    codes: Tensor
    codebook: Tensor
    scales: Tensor
    scheme: FloatScheme
    scale_bits: int = 32

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise FormatError(
                f"codes must be a uint8 matrix, found {self.codes.dtype} "
                f"of shape {list(self.codes.shape)}"
            )
        if self.codebook.ndim != 1 or self.codebook.dtype != torch.float32:
            raise FormatError(f"a codebook is a float32 vector, found {self.codebook.dtype}")
        blocks = -(-self.codes.numel() // self.block_size)
        if tuple(self.scales.shape) != (blocks,):
            raise FormatError(
                f"scales have shape {list(self.scales.shape)}, {self.scheme} of a "
                f"{self.shape[0]} x {self.shape[1]} weight needs [{blocks}]"
            )
        if self.codes.numel() and int(self.codes.max()) >= self.codebook.numel():
            raise FormatError(f"a code is beyond the {self.codebook.numel()} entries of its table")

    @property
    def block_size(self) -> int:
        return self.scheme.block[1] or self.codes.shape[1]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes once packed: codes at their width, scales as they were stored."""
        code_bits = max(1, (self.codebook.numel() - 1).bit_length())
        return (self.codes.numel() * code_bits + self.scales.numel() * self.scale_bits) // 8

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = self.codebook[self.codes.flatten().int()]
        scales = self.scales.repeat_interleave(self.block_size)[: values.numel()]
        return values.mul_(scales).view(self.shape).to(dtype)

    def rows(self, order: Tensor) -> CodebookWeight | DenseWeight:
        """Some of its output rows, or all of them in another order (int64 [n])."""
        out_features, in_features = self.shape
        if in_features % self.block_size == 0:
            scales = self.scales.view(out_features, -1)[order].flatten()
            return CodebookWeight(
                self.codes[order], self.codebook, scales, self.scheme, self.scale_bits
            )
        # Blocks cross rows, so that rows cannot stand alone.
        places = order.unsqueeze(1) * in_features + torch.arange(in_features)
        values = self.codebook[self.codes[order].int()]
        return DenseWeight(values.mul_(self.scales[places // self.block_size]))


@dataclass(frozen=True, slots=True, eq=False)
class TableWeight:
    """Codes that are places in a table that each output row has of its own: weight[o, k] =
    tables[o, codes[o, k]].

    codes   [out, in]  uint8
    tables  [out, n]   floating, in the type that files store; n is a power of two
    """

    codes: Tensor
    tables: Tensor
    scheme: FloatScheme

    def __post_init__(self) -> None:
        if self.codes.ndim != 2 or self.codes.dtype != torch.uint8:
            raise FormatError(
                f"codes must be a uint8 matrix, found {self.codes.dtype} "
                f"of shape {list(self.codes.shape)}"
            )
        if self.tables.ndim != 2 or not self.tables.is_floating_point():
            raise FormatError(f"tables are a floating-point matrix, found {self.tables.dtype}")
        if self.tables.shape[0] != self.codes.shape[0]:
            raise FormatError(
                f"{self.tables.shape[0]} tables for {self.codes.shape[0]} rows; each needs its own"
            )
        entries = self.tables.shape[1]
        if entries < 2 or entries & (entries - 1):
            raise FormatError(f"tables of {entries} entries; a power of two is needed")
        if self.codes.numel() and int(self.codes.max()) >= entries:
            raise FormatError(f"a code is beyond the {entries} entries of its table")

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape[0], self.codes.shape[1]

    @property
    def bits(self) -> int:
        """Of a code."""
        return (self.tables.shape[1] - 1).bit_length()

    @property
    def nbytes(self) -> int:
        """Bytes once packed: codes at their width, and the tables."""
        return self.codes.numel() * self.bits // 8 + self.tables.nbytes

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        values = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        # In slabs: places in a table are looked up by 64-bit numbers.
        height = max(1, SLAB_WEIGHTS // max(1, self.shape[1]))
        for begin in range(0, self.shape[0], height):
            rows = slice(begin, begin + height)
            values[rows] = torch.gather(self.tables[rows], 1, self.codes[rows].long()).to(dtype)
        return values

    def rows(self, order: Tensor) -> TableWeight:
        """Some of its output rows, or all of them in another order (int64 [n])."""
        return TableWeight(self.codes[order], self.tables[order], self.scheme)


FLOAT8_TYPES = (torch.float8_e4m3fn, torch.float8_e5m2)


def num_blocks(shape: tuple[int, int], scheme: FloatScheme) -> tuple[int, int]:
    """Blocks along each axis of a weight [out, in]."""
    rows, columns = scheme.block
    down = 1 if rows is None else -(-shape[0] // rows)
    return down, 1 if columns is None else -(-shape[1] // columns)


Weight = DenseWeight | QuantizedWeight | BlockWeight | Float8Weight | CodebookWeight | TableWeight
