"""Parts of a weight: runs of its output rows, a run of its input columns.

Rows stand alone in every format. Columns share scales: a run that begins or ends inside a group of
integers or of 8-bit floats is held in smaller groups, each with the scale of the one that it lies
in, which changes no value. Blocks of GGUF types cannot be cut.

    group 128, columns 0..447   ->  groups of 64: scales s0 s0 s1 s1 s2 s2 s3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qtool.errors import UnsupportedModel
from qtool.scheme import FloatScheme, QuantScheme
from qtool.weights import (
    BlockWeight,
    CodebookWeight,
    DenseWeight,
    Float8Weight,
    QuantizedWeight,
    TableWeight,
    Weight,
)


@dataclass(frozen=True, slots=True)
class Part:
    """rows: runs of outputs, one after the other; columns: a run of inputs. None: all of them."""

    rows: tuple[range, ...] | None = None
    columns: range | None = None

    def __post_init__(self) -> None:
        runs = [*(self.rows or ()), *([] if self.columns is None else [self.columns])]
        assert all(len(run) > 0 and run.step == 1 for run in runs), self

    @property
    def is_whole(self) -> bool:
        return self.rows is None and self.columns is None


WHOLE = Part()


def take(weight: Weight, part: Part) -> Weight:
    """A weight of its own: nothing of the rest is kept in memory.

    Raises UnsupportedModel for columns that cut a block which cannot be cut.
    """
    if part.columns is not None and part.columns != range(weight.shape[1]):
        weight = _columns(weight, part.columns)
    if part.rows is None:
        return weight
    if isinstance(weight, DenseWeight):
        return DenseWeight(take_runs(weight.values, part.rows))
    return weight.rows(row_numbers(part.rows))


def take_runs(tensor: Tensor, runs: Sequence[range]) -> Tensor:
    """Runs of the first axis of a tensor [n, ...], one after the other, copied."""
    return torch.cat([tensor[run.start : run.stop] for run in runs])


def row_numbers(runs: Sequence[range]) -> Tensor:
    return torch.cat([torch.arange(run.start, run.stop) for run in runs])


def _columns(weight: Weight, run: range) -> Weight:
    if isinstance(weight, DenseWeight):
        return DenseWeight(weight.values[:, run.start : run.stop].clone())
    if isinstance(weight, QuantizedWeight):
        return _quantized_columns(weight, run)
    if isinstance(weight, Float8Weight):
        return _float8_columns(weight, run)
    if isinstance(weight, CodebookWeight):
        return _codebook_columns(weight, run)
    if isinstance(weight, TableWeight):
        codes = weight.codes[:, run.start : run.stop].contiguous()
        return TableWeight(codes, weight.tables, weight.scheme)
    return _block_columns(weight, run)


def _quantized_columns(weight: QuantizedWeight, run: range) -> QuantizedWeight:
    codes = weight.codes[:, run.start : run.stop].contiguous()
    scheme = weight.scheme
    if scheme.group_size is None:
        return QuantizedWeight(codes, weight.scales, weight.zeros, scheme)
    size = shared_size(scheme.group_size, run)
    groups = _groups_of(run, size, scheme.group_size)
    zeros = None if weight.zeros is None else weight.zeros[:, groups]
    scheme = QuantScheme(scheme.bits, size, scheme.symmetric)
    return QuantizedWeight(codes, weight.scales[:, groups], zeros, scheme)


def _float8_columns(weight: Float8Weight, run: range) -> Float8Weight:
    # Bytes are cut: torch does not copy every 8-bit float type.
    bytes_ = weight.values.view(torch.uint8)[:, run.start : run.stop].contiguous()
    values, (rows, columns) = bytes_.view(weight.values.dtype), weight.scheme.block
    if columns is None:
        return Float8Weight(values, weight.scales, weight.scheme)
    columns = min(columns, weight.shape[1])
    size = shared_size(columns, run)
    scales = weight.scales[:, _groups_of(run, size, columns)]
    return Float8Weight(values, scales, FloatScheme(weight.scheme.name, (rows, size)))


def _codebook_columns(weight: CodebookWeight, run: range) -> CodebookWeight | DenseWeight:
    in_features, block = weight.shape[1], weight.block_size
    if in_features % block:  # blocks cross rows
        return DenseWeight(weight.dequantize()[:, run.start : run.stop].clone())
    size = shared_size(block, run)
    scales = weight.scales.view(-1, in_features // block)[:, _groups_of(run, size, block)]
    return CodebookWeight(
        weight.codes[:, run.start : run.stop].contiguous(),
        weight.codebook,
        scales.flatten(),
        FloatScheme(weight.scheme.name, (weight.scheme.block[0], size)),
        weight.scale_bits,
    )


def _block_columns(weight: BlockWeight, run: range) -> BlockWeight:
    codec = weight.codec
    if run.start % codec.block_size or run.stop % codec.block_size:
        raise UnsupportedModel(
            f"inputs {run.start} to {run.stop} cut a {codec.name} block of {codec.block_size}"
        )
    start, stop = (edge // codec.block_size * codec.block_bytes for edge in (run.start, run.stop))
    return BlockWeight(weight.data[:, start:stop].clone(), len(run), codec)


def shared_size(group: int, run: range) -> int:
    """The largest group within groups of `group` that fills a run of columns."""
    return math.gcd(group, run.start, run.stop)


def _groups_of(run: range, size: int, group: int) -> Tensor:
    """Which group each of the smaller groups of a run lies in."""
    return torch.arange(run.start, run.stop, size) // group
