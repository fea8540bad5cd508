"""What runs which layers, and why: counted at load, printed by whoever starts a server."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple


class Use(NamedTuple):
    """A role's weight, how it is stored, the kernel that runs it, and why that one."""

    role: str
    stored: str
    kernel: str
    reason: str


@dataclass(frozen=True, slots=True)
class KernelUse:
    """`count` layers of one kind, stored one way, run by one kernel for one reason.

    part  of a model on several devices, which of them
    """

    layer: str
    weight: str
    kernel: str
    reason: str
    count: int
    part: int = 0


def count_uses(uses: Iterable[Use]) -> tuple[KernelUse, ...]:
    """In the order in which they first come."""
    return tuple(KernelUse(*use, count) for use, count in Counter(uses).items())
