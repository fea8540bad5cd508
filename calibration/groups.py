"""Which linears of a block share an input, and in which passes their statistics are taken."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from qtool.calibration.linears import Site
from qtool.calibration.originals import Point


class InputGroup(NamedTuple):
    """Linears fed the same tensor. The first stands for all of them.

    calls   how often it was fed in the traced chunk
    source  the module whose output the tensor was, where that is a norm: a name in the block
    """

    sites: tuple[Site, ...]
    calls: int
    source: str | None

    @property
    def first(self) -> Site:
        return self.sites[0]


class Compared(NamedTuple):
    """Where a group's linears are compared with the original stream.

    point  a place that the output of the group's one linear is added to, or the input of the norm
           that feeds the group
    added  whether it is the first of these
    """

    point: Point
    added: bool


@dataclass(frozen=True, slots=True)
class Stage:
    """Groups whose statistics are taken in one pass."""

    groups: tuple[InputGroup, ...]

    @property
    def stops_early(self) -> bool:
        """Whether the pass can end as soon as each group was fed once."""
        return all(group.calls == 1 and group.first.expert is None for group in self.groups)


def stages(groups: Sequence[InputGroup], *, sequential: bool) -> list[Stage]:
    """The passes to take: one for all groups, or, sequentially, one for each in the order they are
    fed, so that each sees the linears before it already quantized. The experts of a parameter go
    together.
    """
    if not sequential:
        return [Stage(tuple(groups))] if groups else []
    by_parameter: dict[tuple[str, bool], list[InputGroup]] = {}
    for group in groups:
        key = (group.first.parameter, group.first.expert is None)
        by_parameter.setdefault(key, []).append(group)
    return [Stage(tuple(found)) for found in by_parameter.values()]
