"""Which parts of a packed linear's tensors a part of its weight lies in.

int4 in words of 8, groups of 128; rows 256..511, columns 1024..2047 of pack-quantized:
weight_packed [256:512, 128:256]   weight_scale [256:512, 8:16]
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from qtool.convert.layer import Axis, Layout
from qtool.convert.packing import WORD_BITS
from qtool.scheme import FloatScheme, QuantScheme
from qtool.weight_parts import Part


class Packed(Protocol):
    """A packed linear, checked against its headers."""

    @property
    def layout(self) -> Layout: ...

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def scheme(self) -> QuantScheme | FloatScheme: ...


class Cut(NamedTuple):
    """Of one tensor: the shape that it must have, and a run along each axis, None for all of it."""

    shape: tuple[int, ...]
    runs: tuple[range | None, ...]


def part_shape(shape: tuple[int, int], part: Part) -> tuple[int, int]:
    rows, columns = _runs(shape, part)
    return len(rows), len(columns)


def cuts_of(packed: Packed, part: Part) -> dict[str, Cut] | None:
    """By suffix; None where an edge lies inside a word or a group, or the layout has no axes."""
    layout = packed.layout
    if not layout.axes or (part.rows is not None and len(part.rows) > 1):
        return None
    rows, columns = _runs(packed.shape, part)
    cuts = {}
    for suffix, axes in layout.axes.items():
        lengths, runs = [], []
        for axis in axes:
            total, run = _along(axis, packed, rows, columns)
            if run is None:
                return None
            lengths.append(total)
            runs.append(None if run == range(total) else run)
        cuts[suffix] = Cut(tuple(lengths), tuple(runs))
    return cuts


def _runs(shape: tuple[int, int], part: Part) -> tuple[range, range]:
    rows = range(shape[0]) if part.rows is None else part.rows[0]
    return rows, range(shape[1]) if part.columns is None else part.columns


def _along(axis: Axis, packed: Packed, rows: range, columns: range) -> tuple[int, range | None]:
    """The length of an axis, and the run of it; None where that cuts an element."""
    out_features, in_features = packed.shape
    total, run = (out_features, rows) if axis.startswith("out") else (in_features, columns)
    scheme = packed.scheme
    num, den = 1, 1
    if axis.endswith("words"):
        assert isinstance(scheme, QuantScheme), scheme
        num, den = scheme.bits, WORD_BITS
    elif axis == "in pairs":
        den = 2
    elif axis == "groups":
        group = scheme.group_size if isinstance(scheme, QuantScheme) else scheme.block[1]
        if group is None:  # one scale for all columns, however many are taken
            return 1, range(1)
        den = group
    whole = -(-total * num // den)
    if run == range(total):
        return whole, range(whole)
    if den % num:  # codes cross words, and older files pack such widths another way
        return whole, None
    if run.start * num % den or run.stop * num % den:
        return whole, None
    return whole, range(run.start * num // den, run.stop * num // den)
